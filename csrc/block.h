// One vocabulary block from start to end, forward and backward, and the table of one instruction
// set's functions. Included last by an isa_*.cpp.
#ifndef AGRO_BLOCK_H
#define AGRO_BLOCK_H

namespace agro {
namespace {

template <class In>
inline void widen_bias(const agro_head& head, Block block, float* out) {
  if (head.bias == nullptr) {
    memset(out, 0, block.rows * sizeof(float));
  } else {
    widen<In>(static_cast<const typename In::Element*>(head.bias) + block.v0, block.rows,
              block.rows, out);
  }
}

// One panel's statistics over a block, merged into those of the span. Its logits are kept if the
// block's are.
template <class In, bool CAP, bool ENTROPY>
void finish_statistics(const Forward& job, const Scratch& scratch, Block block, Statistics span,
                       bool first, int64_t panel) {
  const int64_t token = panel * kLanes, live = job.tokens - token;
  float* z = scratch.logits + panel * kBlock * kLanes;
  float of_block[3][kLanes];
  const Statistics a = {span.m + token, span.s + token, span.e + token};
  const Statistics b = first ? a : Statistics{of_block[0], of_block[1], of_block[2]};
  panel_statistics<CAP, ENTROPY>(z, block.rows, scratch.bias, job.head->softcap,
                                 job.inverse_temperature + token, live, b);
  if (block.v0 < job.kept_blocks * kBlock) {
    keep_panel<typename Kept<In>::Type>(job, block, token, z, b.m);
  }
  if (!first) merge_panel<ENTROPY>(a, b, live);
  for (int64_t lane = 0; lane < min_of(live, kLanes); ++lane) {
    const int64_t v = job.targets[token + lane] - block.v0;
    if (v >= 0 && v < block.rows) job.target_logits[token + lane] = z[v * kLanes + lane];
  }
}

// The statistics of kSpan blocks, merged in their order. The tokens are one chunk at most.
template <class In, class Sum>
void forward_span(const Forward& job, const Scratch& scratch, int64_t span) {
  const int64_t blocks = ceil_div(job.head->v, kBlock), padded = job.panels * kLanes;
  float* m = job.statistics + span * 3 * padded;
  const Statistics of_span = {m, m + padded, m + 2 * padded};
  const auto finish =
      job.head->softcap > 0.0f
          ? (job.with_entropy ? finish_statistics<In, true, true>
                              : finish_statistics<In, true, false>)
          : (job.with_entropy ? finish_statistics<In, false, true>
                              : finish_statistics<In, false, false>);
  for (int64_t index = span * kSpan; index < min_of((span + 1) * kSpan, blocks); ++index) {
    const Block block = block_of(job, index);
    const bool first = index == span * kSpan;
    const int64_t next = index + 1 < blocks ? (index + 1) * kBlock : -1;
    widen_bias<In>(*job.head, block, scratch.bias);
    block_products<In, Sum>(job, scratch, block, next, 0, job.panels, [&](int64_t panel) {
      finish(job, scratch, block, of_span, first, panel);
    });
  }
  stream_end();  // of the kept logits
}

// logprobs, lse and entropy of some panels' tokens from the statistics of all spans, in order.
void forward_result(const Forward& job, int64_t panel_begin, int64_t panel_end) {
  const int64_t spans = ceil_div(job.head->v, kBlock * kSpan), padded = job.panels * kLanes;
  for (int64_t token = panel_begin * kLanes; token < min_of(panel_end * kLanes, job.tokens);
       token += kWidth) {
    const float* of_span = job.statistics + token;
    Vec m = load(of_span), s = load(of_span + padded);
    Vec e = job.with_entropy ? load(of_span + 2 * padded) : zero();
    for (int64_t span = 1; span < spans; ++span) {
      of_span += 3 * padded;
      if (job.with_entropy) {
        merge<true>(m, s, e, load(of_span), load(of_span + padded), load(of_span + 2 * padded));
      } else {
        merge<false>(m, s, e, load(of_span), load(of_span + padded), zero());
      }
    }
    float largest[kWidth], sum[kWidth], weighted[kWidth];
    store(largest, m);
    store(sum, s);
    store(weighted, e);
    for (int64_t i = 0; i < min_of(kWidth, job.tokens - token); ++i) {
      const int64_t row = job.rows[token + i];
      const float log_sum = logf(sum[i]);
      job.logprobs[row] = (job.target_logits[token + i] - largest[i]) - log_sum;
      job.lse[row] = largest[i] + log_sum;
      if (job.with_entropy) job.entropy[row] = log_sum - weighted[i] / sum[i];
    }
  }
}

template <class Sum>
struct Rounded {  // fp32 gradients serve both products as they are
  static void panel(float*, int64_t, float*) {}
};
#ifdef AGRO_HAVE_DOT
template <>
struct Rounded<Pairs> {
  static void panel(float* gradient, int64_t rows, float* gradient_rows) {
    pair_panel(gradient, rows, gradient_rows);
  }
};
#endif

// The gradients of the logits of panel `panel0 + i`, in the form the products need.
template <class In, class Sum, bool CAP, bool ENTROPY>
void finish_gradient(const Backward& job, const Scratch& scratch, Block block, int64_t panel0,
                     int64_t i) {
  const int64_t token = (panel0 + i) * kLanes;
  float* x = scratch.logits + i * kBlock * kLanes;
  const auto into_x = [&](const auto& logits) {
    panel_gradient<CAP, ENTROPY>(logits, x, block.rows, upstream_of(job, token),
                                 job.tokens - token, job.targets + token, block.v0);
  };
  if (block.v0 < job.kept_blocks * kBlock) {
    // weight_rows is free: there is no product of them.
    into_x(kept_panel<typename Kept<In>::Type>(job, block, token, scratch.weight_rows));
  } else {
    into_x(MadeAgain{x, scratch.bias, job.head->softcap});
  }
  overwrite_entries(job, block.v0 / kBlock, token, x);
  if (job.dbias != nullptr) {
    for (int64_t at = 0; at < block.rows * kLanes; at += kWidth) {
      store(scratch.dbias_lanes + at, add(load(scratch.dbias_lanes + at), load(x + at)));
    }
  }
  if (scratch.gradient_rows != nullptr) {
    Rounded<Sum>::panel(x, block.rows, scratch.gradient_rows + i * kBlock * kLanes / Sum::kUnit);
  }
}

template <class In>
inline void write_dbias(const Backward& job, const Scratch& scratch, Block block) {
  float sums[kBlock];
  for (int64_t v = 0; v < block.rows; ++v) {
    sums[v] = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[v] += scratch.dbias_lanes[v * kLanes + lane];
  }
  narrow<In>(sums, block.rows, static_cast<typename In::Element*>(job.dbias) + block.v0, false);
}

// One block's share of every gradient.
template <class In, class Sum>
void backward_block(const Backward& job, const Scratch& scratch, int64_t index, int64_t next_index,
                    const DhiddenSum& sum) {
  const Block block = block_of(job, index);
  widen_bias<In>(*job.head, block, scratch.bias);
  const auto finish = job.head->softcap > 0.0f
                          ? (job.with_entropy ? finish_gradient<In, Sum, true, true>
                                              : finish_gradient<In, Sum, true, false>)
                          : (job.with_entropy ? finish_gradient<In, Sum, false, true>
                                              : finish_gradient<In, Sum, false, false>);
  const bool kept = index < job.kept_blocks;
  if (job.dbias != nullptr) memset(scratch.dbias_lanes, 0, kBlock * kLanes * sizeof(float));
  for (int64_t panel0 = 0; panel0 < job.panels; panel0 += job.chunk_panels) {
    const int64_t panels = min_of(job.chunk_panels, job.panels - panel0);
    const bool last = panel0 + panels == job.panels;
    const int64_t next = last && next_index >= 0 ? next_index * kBlock : -1;
    const bool unread = kept && panel0 == 0 && sum.panels != nullptr;
    if (kept) {
      for (int64_t i = 0; i < panels; ++i) {
        if (unread) prefetch_weight_columns<In>(*job.head, block, 0, i, panels);
        finish(job, scratch, block, panel0, i);
      }
    } else {
      block_products<In, Sum>(job, scratch, block, next, panel0, panels,
                              [&](int64_t i) { finish(job, scratch, block, panel0, i); });
    }
    if (sum.panels != nullptr) {
      dhidden_product<In, Sum>(job, scratch, block, panel0, panels, sum, unread);
    }
    if (job.hidden_columns != nullptr) {
      dweight_product<In, Sum>(job, scratch, block, panel0, panels);
    }
  }
  if (job.dbias != nullptr) write_dbias<In>(job, scratch, block);
  stream_end();
}

// dhidden of some panels' tokens: the sums added up, turned into rows and rounded.
template <class In>
void dhidden_result(const Backward& job, int64_t panel_begin, int64_t panel_end) {
  const agro_head& head = *job.head;
  const int64_t all_columns = round_up(head.d, kTileRows);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t live = min_of(kLanes, job.tokens - panel * kLanes);
    for (int64_t d0 = 0; d0 < head.d; d0 += kLanes) {
      const int64_t columns = min_of(kLanes, head.d - d0);
      float tile[kLanes][kLanes];  // [token][column]
      for (int64_t d = 0; d < columns; ++d) {
        const int64_t at = (panel * all_columns + d0 + d) * kLanes;
        float sum[kLanes];
        memcpy(sum, job.dhidden_panels[0] + at, sizeof(sum));
        for (int32_t part = 1; part < job.dhidden_parts; ++part) {
          for (int64_t j = 0; j < kLanes; j += kWidth) {
            store(sum + j, add(load(sum + j), load(job.dhidden_panels[part] + at + j)));
          }
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) tile[lane][d] = sum[lane];
      }
      for (int64_t lane = 0; lane < live; ++lane) {
        const int64_t row = job.rows[panel * kLanes + lane];
        typename In::Element* out = static_cast<typename In::Element*>(job.dhidden) + row * head.d;
        narrow<In>(tile[lane], columns, out + d0, false);
      }
    }
  }
}

template <class In, class Sum>
void pack_hidden(const Problem& problem, int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    pack_panel<In, Sum>(problem, panel);
    if (problem.hidden_columns != nullptr) pack_columns<In, Sum>(problem, panel);
  }
}

// --- The table -----------------------------------------------------------------------------------

template <Vec (*f)(Vec)>
void of_each(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    float part[kWidth] = {};
    const int64_t count = min_of(kWidth, n - i);
    memcpy(part, x + i, count * sizeof(float));
    store(part, f(load(part)));
    memcpy(y + i, part, count * sizeof(float));
  }
}

#ifdef AGRO_HAVE_DOT
typedef Pairs BFloat16Sum;
#else
typedef Single BFloat16Sum;
#endif

template <class In, class Sum>
constexpr DtypeKernels kernels_of() {
  return {Sum::kUnit, pack_hidden<In, Sum>, forward_span<In, Sum>, backward_block<In, Sum>,
          dhidden_result<In>};
}

constexpr Kernels kernels_named(const char* isa) {
  return {isa,
          kLanes,
          kTileRows,
          {kernels_of<Float32, Single>(), kernels_of<BFloat16, BFloat16Sum>(),
           kernels_of<Float16, Single>()},
          forward_result,
          of_each<vector_exp>,
          of_each<vector_tanh>};
}

}  // namespace
}  // namespace agro

#endif
