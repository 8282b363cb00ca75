// Which rows count, which thread does what, and in which memory. The numbers are made in block.h.
#include "linear_logprobs.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "memory.h"
#include "team.h"

namespace agro {

namespace {

constexpr float kNotFound = std::numeric_limits<float>::quiet_NaN();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t unit_of(const Kernels& kernels, const agro_head& head) {
  return kernels.of_dtype[head.dtype].unit;
}

int64_t element_bytes(const agro_head& head) { return head.dtype == AGRO_FLOAT32 ? 4 : 2; }

std::vector<int64_t> counted_rows(const agro_head& head) {
  std::vector<int64_t> rows;
  rows.reserve(head.n);
  for (int64_t row = 0; row < head.n; ++row) {
    if (head.targets[row] != head.ignore_index) rows.push_back(row);
  }
  return rows;
}

void clear_other_rows(const agro_head& head, const std::vector<int64_t>& rows, void* values,
                      int64_t row_bytes) {
  if (head.n == 0) return;  // and values may be NULL
  int64_t next = 0;
  for (const int64_t row : rows) {
    std::memset(static_cast<char*>(values) + next * row_bytes, 0, (row - next) * row_bytes);
    next = row + 1;
  }
  std::memset(static_cast<char*>(values) + next * row_bytes, 0, (head.n - next) * row_bytes);
}

// Starting a thread costs about as much as 10^6 products; a smaller share is not worth one.
int32_t useful_threads(const agro_head& head, int64_t tokens, int64_t units) {
  const double products = static_cast<double>(tokens) * head.d * head.v;
  const int64_t worth = 1 + static_cast<int64_t>(std::min(products / 1e6, 1e6));
  return static_cast<int32_t>(
      std::max<int64_t>(1, std::min({int64_t{head.num_threads}, units, worth})));
}

void describe_kept(Problem& problem, const agro_kept& kept) {
  problem.kept_blocks = ceil_div(kept.columns, kBlock);
  problem.kept_logits = kept.logits;
  problem.kept_maxima = kept.maxima;
}

// The packed form of some of the counted rows, and the memory that holds it.
struct Packed {
  Packed(const Kernels& kernels, const agro_head& head, const int64_t* rows, int64_t tokens,
         bool with_columns)
      : panels(ceil_div(tokens, kernels.lanes)),
        padded(panels * kernels.lanes),
        targets(padded, -1),
        inverse_temperature(padded, 1.0f),
        hidden_panels(padded * std::max<int64_t>(1, ceil_div(head.d, unit_of(kernels, head)))),
        hidden_columns(with_columns ? padded / unit_of(kernels, head) *
                                          ceil_div(head.d, kernels.lanes) * kernels.lanes
                                    : 0) {
    for (int64_t token = 0; token < tokens; ++token) {
      targets[token] = head.targets[rows[token]];
      inverse_temperature[token] =
          1.0f / (head.token_temperature == nullptr ? head.temperature
                                                    : head.token_temperature[rows[token]]);
    }
  }

  void describe(Problem& problem, const agro_head& head, const int64_t* rows,
                int64_t tokens) const {
    problem.head = &head;
    problem.tokens = tokens;
    problem.panels = panels;
    problem.rows = rows;
    problem.targets = targets.data();
    problem.inverse_temperature = inverse_temperature.data();
    problem.hidden_panels = hidden_panels.floats();
    problem.hidden_columns = hidden_columns.floats();
  }

  int64_t panels, padded;
  std::vector<int64_t> targets;
  std::vector<float> inverse_temperature;
  Buffer hidden_panels, hidden_columns;
};

// The coefficients of each row's dz, as Backward lists them; zeros in the padding.
struct Coefficients {
  Coefficients(const Packed& packed, const std::vector<int64_t>& rows, const float* dlogprobs,
               const float* dlse, const float* dentropy, const float* dsum,
               const float* lse_of_rows, const float* entropy_of_rows)
      : lse(packed.padded),
        entropy(packed.padded),
        at_target(packed.padded),
        of_p(packed.padded),
        of_lse(packed.padded),
        of_entropy(packed.padded),
        of_all(packed.padded) {
    for (size_t token = 0; token < rows.size(); ++token) {
      const int64_t row = rows[token];
      const float scale = packed.inverse_temperature[token];
      lse[token] = lse_of_rows[row];
      at_target[token] = dlogprobs == nullptr ? 0.0f : dlogprobs[row] * scale;
      of_lse[token] = dlse == nullptr ? 0.0f : dlse[row] * scale;
      of_p[token] = of_lse[token] - at_target[token];
      of_all[token] = dsum == nullptr ? 0.0f : dsum[row] * scale;
      if (dentropy == nullptr) continue;
      entropy[token] = entropy_of_rows[row];
      of_entropy[token] = dentropy[row] * scale;
    }
  }

  void describe(Backward& job) const {
    job.lse = lse.data();
    job.entropy = entropy.data();
    job.at_target = at_target.data();
    job.of_p = of_p.data();
    job.of_lse = of_lse.data();
    job.of_entropy = of_entropy.data();
    job.of_all = of_all.data();
  }

  std::vector<float> lse, entropy, at_target, of_p, of_lse, of_entropy, of_all;
};

// The entries of the counted rows by block, and in a block by token.
struct SortedEntries {
  SortedEntries(const agro_head& head, const std::vector<int64_t>& rows, const agro_entries& given)
      : begins(given.count > 0 ? ceil_div(head.v, kBlock) + 1 : 0, 0) {
    if (given.count == 0) return;
    const auto of_each = [&](const auto& use) {
      for (size_t token = 0; token < rows.size(); ++token) {
        for (int64_t k = 0; k < given.count; ++k) {
          const int64_t at = rows[token] * given.count + k, id = given.ids[at];
          if (id >= 0 && id < head.v) use(static_cast<int32_t>(token), id, given.values[at]);
        }
      }
    };
    of_each([&](int32_t, int64_t id, float) { ++begins[id / kBlock + 1]; });
    for (size_t block = 1; block < begins.size(); ++block) begins[block] += begins[block - 1];
    sorted.resize(begins.back());
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    of_each([&](int32_t token, int64_t id, float value) {
      sorted[next[id / kBlock]++] = {token, static_cast<int32_t>(id % kBlock), value};
    });
  }

  void describe(Backward& job) const {
    job.entries = sorted.data();
    job.entries_of_block = begins.empty() ? nullptr : begins.data();
  }

  std::vector<int64_t> begins;
  std::vector<Entry> sorted;
};

// Which gradients are wanted.
struct Wanted {
  bool dhidden, dweight, dbias;
};

// Whether the gradients of the logits are rounded to units, in a buffer beside the logits.
bool is_rounded(const Kernels& kernels, const agro_head& head, Wanted wanted) {
  return unit_of(kernels, head) > 1 && (wanted.dhidden || wanted.dweight);
}

// Columns of the tiles in which a thread sums up the gradient of a block of weight: chunks of
// tokens add to all of them, one chunk alone needs those of one piece.
int64_t dweight_columns(const agro_head& head, bool one_chunk) {
  return one_chunk ? std::min(kSlice, head.d) : head.d;
}

// Tokens whose logits of a block a thread of the backward pass holds at the same time. Few threads
// hold kChunk. Of many it is as many as make the logits of all threads together a quarter of all
// there are, in whole slices, which leave every sum as it is; unless the tiles of dweight, which
// then are as wide as D, would take more than that saves.
int64_t chunk_tokens(const Kernels& kernels, const agro_head& head, int64_t tokens, Wanted wanted,
                     int64_t blocks, int32_t threads) {
  if (threads <= kSums) return kChunk;
  const int64_t share = tokens * blocks / (4 * threads) / kSlice * kSlice;
  const int64_t chunk = std::max(kSlice, std::min(share, kChunk));
  const auto columns = [&](int64_t length) {  // of kBlock floats
    const int64_t held = std::min(length, tokens), unit = unit_of(kernels, head);
    return held + (is_rounded(kernels, head, wanted) ? held / unit : 0) +
           (wanted.dweight ? dweight_columns(head, tokens <= length) : 0);
  };
  return columns(chunk) < columns(kChunk) ? chunk : kChunk;
}

// What one thread works in, in one piece: huge pages are for large buffers only.
struct Workspace {
  // chunk_panels: how many of the panels exist at the same time.
  Workspace(const Kernels& kernels, const agro_head& head, const Problem& problem, Wanted wanted,
            int64_t chunk_panels) {
    const int64_t unit = unit_of(kernels, head), lanes = kernels.lanes;
    const int64_t chunk = std::min(problem.panels, chunk_panels) * kBlock * lanes;
    const bool rounded = is_rounded(kernels, head, wanted);
    const int64_t columns = dweight_columns(head, problem.panels <= chunk_panels);
    const int64_t column_tile = kBlock * kernels.tile_rows + kPad;
    int64_t size = 0;
    const auto place = [&size](bool needed, int64_t count) {
      const int64_t at = size;
      size += needed ? ceil_div(count, kPad) * kPad : 0;
      return at;
    };
    const int64_t weight_rows = place(true, kBlock * (kDepth + kPad));
    const int64_t weight_columns =
        place(wanted.dhidden, kColumns / kernels.tile_rows * column_tile);
    const int64_t bias = place(true, kBlock);
    const int64_t logits = place(true, chunk);
    const int64_t gradient_rows = place(rounded, chunk / unit);
    const int64_t dweight_tiles = place(wanted.dweight, ceil_div(columns, lanes) * lanes * kBlock);
    const int64_t dbias_lanes = place(wanted.dbias, kBlock * lanes);
    memory = Buffer(size);
    float* const base = memory.floats();
    scratch = {base + weight_rows,
               base + weight_columns,
               base + bias,
               base + logits,
               rounded ? base + gradient_rows : nullptr,
               base + dweight_tiles,
               base + dbias_lanes};
  }

  Buffer memory;
  Scratch scratch;
};

void pack(const Kernels& kernels, const Problem& problem, int32_t threads) {
  run_team(threads, [&](int32_t thread, int32_t team) {
    const Share share = share_of(problem.panels, thread, team);
    kernels.of_dtype[problem.head->dtype].pack_hidden(problem, share.begin, share.end);
  });
}

// The forward of at most kChunk counted rows.
void forward_chunk(const Kernels& kernels, const agro_head& head, const int64_t* rows,
                   int64_t tokens, float* logprobs, float* lse, float* entropy,
                   const agro_kept& kept) {
  const Packed packed(kernels, head, rows, tokens, false);
  const int64_t spans = ceil_div(head.v, kBlock * kSpan);
  const Buffer statistics(spans * 3 * packed.padded);
  std::vector<float> target_logits(packed.padded, kNotFound);
  Forward job;
  packed.describe(job, head, rows, tokens);
  describe_kept(job, kept);
  job.with_entropy = entropy != nullptr;
  job.statistics = statistics.floats();
  job.target_logits = target_logits.data();
  job.logprobs = logprobs;
  job.lse = lse;
  job.entropy = entropy;

  const int32_t threads = useful_threads(head, tokens, spans);
  std::vector<Workspace> workspaces;
  for (int32_t i = 0; i < threads; ++i) {
    workspaces.emplace_back(kernels, head, job, Wanted{}, packed.panels);
  }
  pack(kernels, job, threads);
  // Spans go to whoever is free: each has its own place in `statistics`, so the result is the same.
  int64_t next_span = 0;
  run_team(threads, [&](int32_t thread, int32_t) {
    const Scratch& scratch = workspaces[thread].scratch;
    for (int64_t span; (span = __atomic_fetch_add(&next_span, 1, __ATOMIC_RELAXED)) < spans;) {
      kernels.of_dtype[head.dtype].forward_span(job, scratch, span);
    }
  });
  run_team(threads, [&](int32_t thread, int32_t team) {
    const Share share = share_of(packed.panels, thread, team);
    kernels.forward_result(job, share.begin, share.end);
  });
}

}  // namespace

void linear_logprobs_fwd(const Kernels& kernels, const agro_head& head, float* logprobs, float* lse,
                         float* entropy, const agro_kept& kept) {
  const std::vector<int64_t> rows = counted_rows(head);
  for (float* result : {logprobs, lse, entropy}) {
    if (result != nullptr) clear_other_rows(head, rows, result, sizeof(float));
  }
  const int64_t counted = static_cast<int64_t>(rows.size());
  use_huge_pages(kept.logits, head.n * kept.columns * element_bytes(head));
  for (int64_t begin = 0; begin < counted; begin += kChunk) {
    forward_chunk(kernels, head, rows.data() + begin, std::min(kChunk, counted - begin), logprobs,
                  lse, entropy, kept);
  }
}

void linear_logprobs_bwd(const Kernels& kernels, const float* dlogprobs, const float* dlse,
                         const float* dentropy, const float* dsum, const agro_head& head,
                         const float* lse, const float* entropy, void* dhidden, void* dweight, void* dbias,
                         float* weight_grad, const agro_kept& kept, const agro_entries& entries) {
  const std::vector<int64_t> rows = counted_rows(head);
  const int64_t tokens = static_cast<int64_t>(rows.size());
  if (dhidden != nullptr) {
    clear_other_rows(head, rows, dhidden, head.d * element_bytes(head));
  }
  if (tokens == 0) {
    if (dweight != nullptr) std::memset(dweight, 0, head.v * head.d * element_bytes(head));
    if (dbias != nullptr) std::memset(dbias, 0, head.v * element_bytes(head));
    return;
  }
  const Wanted wanted = {dhidden != nullptr && head.d > 0,
                         (dweight != nullptr || weight_grad != nullptr) && head.d > 0,
                         dbias != nullptr};
  if (!wanted.dhidden && !wanted.dweight && !wanted.dbias) return;

  const Packed packed(kernels, head, rows.data(), tokens, wanted.dweight);
  const Coefficients coefficients(packed, rows, dlogprobs, dlse, dentropy, dsum, lse, entropy);
  Backward job;
  packed.describe(job, head, rows.data(), tokens);
  describe_kept(job, kept);
  coefficients.describe(job);
  const SortedEntries sorted(head, rows, entries);
  sorted.describe(job);
  job.with_entropy = dentropy != nullptr;
  job.dhidden = dhidden;
  job.dweight = dweight;
  job.dbias = dbias;
  job.weight_grad = weight_grad;

  const int64_t blocks = ceil_div(head.v, kBlock);
  const int32_t threads = useful_threads(head, tokens, blocks);
  const int64_t columns = ceil_div(head.d, kernels.tile_rows) * kernels.tile_rows;
  job.chunk_panels =
      chunk_tokens(kernels, head, tokens, wanted, blocks, threads) / kernels.lanes;
  std::vector<Workspace> workspaces;
  for (int32_t i = 0; i < threads; ++i) {
    workspaces.emplace_back(kernels, head, job, wanted, job.chunk_panels);
  }
  // Block b is added to sum b % parts, whoever computes it. Few threads have a sum each, and the
  // blocks are dealt out; many take the next block, and share.
  const int32_t parts = std::min(threads, kSums);
  const bool shared = threads > parts && wanted.dhidden;
  const int64_t places = packed.panels * ceil_div(head.d, kColumns);
  std::vector<Buffer> dhidden_buffers;
  std::vector<float*> dhidden_panels;
  for (int32_t part = 0; part < parts; ++part) {
    dhidden_buffers.emplace_back(wanted.dhidden ? packed.padded * columns : 0);
    dhidden_panels.push_back(dhidden_buffers.back().floats());
  }
  std::vector<int32_t> added(shared ? parts * places : 0, 0);
  job.dhidden_panels = dhidden_panels.data();
  job.dhidden_parts = parts;

  pack(kernels, job, threads);
  int64_t taken = 0;
  run_team(threads, [&](int32_t thread, int32_t team) {
    const auto next = [&](int64_t dealt) {
      return team > parts ? __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED) : dealt;
    };
    for (int64_t block = next(thread); block < blocks; block = next(block + team)) {
      const int32_t part = static_cast<int32_t>(block % parts);
      const DhiddenSum sum = {dhidden_panels[part], static_cast<int32_t>(block / parts),
                              shared ? added.data() + part * places : nullptr};
      const int64_t likely_next = block + team < blocks ? block + team : -1;
      kernels.of_dtype[head.dtype].backward_block(job, workspaces[thread].scratch, block,
                                                  likely_next, sum);
    }
  });
  if (wanted.dhidden) {
    run_team(threads, [&](int32_t thread, int32_t team) {
      const Share share = share_of(packed.panels, thread, team);
      kernels.of_dtype[head.dtype].dhidden_result(job, share.begin, share.end);
    });
  }
}

}  // namespace agro
