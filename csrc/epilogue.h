// What happens to the products of a block: statistics in the forward pass, dz in the backward one.
// Lanes are tokens, so every maximum and sum over the vocabulary runs down the rows of a panel.
// Included after pack.h.
#ifndef AGRO_EPILOGUE_H
#define AGRO_EPILOGUE_H

#include <math.h>

namespace agro {
namespace {

// Stands for "no logit yet". Finite, because -inf - -inf is NaN.
constexpr float kLowestMax = -1e30f;
// exp(-1000) is 0. Banned tokens (logit -inf) are lifted to it where a product with their
// probability follows: 0 * -1000 is 0, 0 * -inf is NaN.
constexpr float kNothing = -1000.0f;
// How many probabilities are summed before their sum joins the others; see panel_statistics.
constexpr int64_t kTermsFromZero = 16;

// The vectors of a panel's lanes that hold tokens.
inline int64_t live_vectors(int64_t live) { return ceil_div(min_of(live, kLanes), kWidth); }

template <bool CAP>
inline Vec capped(Vec x, float softcap) {  // tanh(x / softcap); the caller multiplies by softcap
  return CAP ? vector_tanh(div(x, broadcast(softcap))) : x;
}

// --- Forward -------------------------------------------------------------------------------------

// Three rows of `padded` numbers: largest logit m, sum e^(z-m), sum e^(z-m)(z-m).
struct Statistics {
  float *m, *s, *e;
};

// Turns the products of a panel, [rows][kLanes], into logits z and returns their statistics.
template <bool CAP, bool ENTROPY>
inline void panel_statistics(float* z, int64_t rows, const float* bias, float softcap,
                             const float* inverse_temperature, int64_t live, Statistics out) {
  for (int64_t j = 0; j < live_vectors(live) * kWidth; j += kWidth) {
    const Vec slope = load(inverse_temperature + j);
    const Vec factor = CAP ? mul(slope, broadcast(softcap)) : slope;
    Vec m = broadcast(kLowestMax);
    for (int64_t v = 0; v < rows; ++v) {
      const Vec x = add(load(z + v * kLanes + j), broadcast(bias[v]));
      const Vec logit = mul(capped<CAP>(x, softcap), factor);
      store(z + v * kLanes + j, logit);
      m = larger(logit, m);
    }
    // Few terms are summed from zero before they meet the sum of all: beside the 1 of a likely
    // token the tiny terms of the others would be rounded away one by one.
    Vec s = zero(), e = zero();
    for (int64_t v0 = 0; v0 < rows; v0 += kTermsFromZero) {
      Vec s_few = zero(), e_few = zero();
      for (int64_t v = v0; v < min_of(v0 + kTermsFromZero, rows); ++v) {
        Vec shifted = sub(load(z + v * kLanes + j), m);
        if (ENTROPY) shifted = larger(broadcast(kNothing), shifted);
        const Vec p = vector_exp(shifted);
        s_few = add(s_few, p);
        if (ENTROPY) e_few = fma(p, shifted, e_few);
      }
      s = add(s, s_few);
      if (ENTROPY) e = add(e, e_few);
    }
    store(out.m + j, m);
    store(out.s + j, s);
    if (ENTROPY) store(out.e + j, e);
  }
}

// a becomes the statistics of a and b together.
template <bool ENTROPY>
inline void merge(Vec& m, Vec& s, Vec& e, Vec m_b, Vec s_b, Vec e_b) {
  const Vec m_new = larger(m, m_b), shift_a = sub(m, m_new), shift_b = sub(m_b, m_new);
  const Vec scale_a = vector_exp(shift_a), scale_b = vector_exp(shift_b);
  if (ENTROPY) {
    e = fma(fma(shift_a, s, e), scale_a, mul(fma(shift_b, s_b, e_b), scale_b));
  }
  s = fma(s, scale_a, mul(s_b, scale_b));
  m = m_new;
}

template <bool ENTROPY>
inline void merge_panel(Statistics a, Statistics b, int64_t live) {
  for (int64_t j = 0; j < live_vectors(live) * kWidth; j += kWidth) {
    Vec m = load(a.m + j), s = load(a.s + j), e = ENTROPY ? load(a.e + j) : zero();
    merge<ENTROPY>(m, s, e, load(b.m + j), load(b.s + j), ENTROPY ? load(b.e + j) : zero());
    store(a.m + j, m);
    store(a.s + j, s);
    if (ENTROPY) store(a.e + j, e);
  }
}

// --- Kept logits ---------------------------------------------------------------------------------

// fp16's lowest number, in place of what is lower: its probability is 0 all the same, and 0 times it
// is 0.
constexpr float kLowestKept = -65504.0f;

// The vocabulary entries of a block.
struct Block {
  int64_t v0, rows;
};

// Where a token's kept logits of a block lie: that of row v is `first + v * stride`.
struct KeptPlace {
  int64_t first, stride;
};

inline KeptPlace kept_place(const Problem& problem, Block block, int64_t token) {
  const int64_t row = problem.rows[token], n = problem.head->n;
  const int64_t group = row / kKeptRows * kKeptRows;
  return {block.v0 * n + group * block.rows + row - group, min_of(kKeptRows, n - group)};
}

static_assert(kKeptRows % kLanes == 0, "the rows of a whole panel lie side by side");

// Whether the lanes of a panel lie side by side, as they do if no row was left out before it or
// multiples of the lanes were. Rows ascend.
inline bool is_whole(const Problem& problem, int64_t token) {
  const int64_t* rows = problem.rows + token;
  return problem.tokens - token >= kLanes && rows[0] % kLanes == 0 &&
         rows[kLanes - 1] == rows[0] + kLanes - 1;
}

// Keeps the logits z of a panel, [rows][kLanes], and their largest.
template <class Type>
inline void keep_panel(const Problem& problem, Block block, int64_t token, const float* z,
                       const float* m) {
  typedef typename Type::Element Element;
  const int64_t live = min_of(problem.tokens - token, kLanes), n = problem.head->n;
  Element* logits = static_cast<Element*>(problem.kept_logits);
  for (int64_t lane = 0; lane < live; ++lane) {
    // Where no logit is a number there is no largest, and the sum gives back -inf.
    problem.kept_maxima[block.v0 / kBlock * n + problem.rows[token + lane]] =
        m[lane] > kLowestMax ? m[lane] : -INFINITY;
  }
  const auto shifted = [&](int64_t v, int64_t j) {
    return larger(broadcast(kLowestKept), sub(load(z + v * kLanes + j), load(m + j)));
  };
  if (is_whole(problem, token)) {
    const KeptPlace place = kept_place(problem, block, token);
    Element* out = logits + place.first;
    constexpr int64_t kVecBytes = kWidth * sizeof(Element);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kVecBytes == 0 &&
                         place.stride * sizeof(Element) % kVecBytes == 0;
    for (int64_t v = 0; v < block.rows; ++v, out += place.stride) {
      for (int64_t j = 0; j < kLanes; j += kWidth) {
        if (aligned) {
          Type::stream_vec(out + j, shifted(v, j));
        } else {
          Type::store_vec(out + j, shifted(v, j));
        }
      }
    }
    return;
  }
  KeptPlace places[kLanes];
  for (int64_t lane = 0; lane < live; ++lane) {
    places[lane] = kept_place(problem, block, token + lane);
  }
  for (int64_t v = 0; v < block.rows; ++v) {
    Element row[kLanes];
    for (int64_t j = 0; j < live; j += kWidth) Type::store_vec(row + j, shifted(v, j));
    for (int64_t lane = 0; lane < live; ++lane) {
      logits[places[lane].first + v * places[lane].stride] = row[lane];
    }
  }
}

// --- Backward ------------------------------------------------------------------------------------

// The coefficients of a panel's lanes; see Backward.
struct Upstream {
  const float *inverse_temperature, *lse, *entropy, *at_target, *of_p, *of_lse, *of_entropy, *of_all;
};

inline Upstream upstream_of(const Backward& job, int64_t token) {
  return {job.inverse_temperature + token, job.lse + token,  job.entropy + token,
          job.at_target + token,           job.of_p + token, job.of_lse + token,
          job.of_entropy + token,          job.of_all + token};
}

// A vector of logits as the gradient needs them: log p, and t = tanh(x / softcap) of the product x.
struct Terms {
  Vec t, log_p;
};

// The logits of a panel that were made again: products x, [rows][kLanes], which the gradients may
// overwrite one by one.
struct MadeAgain {
  const float *x, *bias;
  float softcap;

  struct Lanes {
    Vec factor, lse;
  };
  template <bool CAP>
  Lanes lanes(const Upstream& up, int64_t j) const {
    const Vec slope = load(up.inverse_temperature + j);
    return {CAP ? mul(slope, broadcast(softcap)) : slope, load(up.lse + j)};
  }
  template <bool CAP>
  Terms terms(const Lanes& lanes, int64_t v, int64_t j) const {
    const Vec t = capped<CAP>(add(load(x + v * kLanes + j), broadcast(bias[v])), softcap);
    return {t, sub(mul(t, lanes.factor), lanes.lse)};
  }
};

// Those that the forward pass kept: row v of them lies at `logits + v * stride`.
template <class Type>
struct KeptPanel {
  const typename Type::Element* logits;
  int64_t stride;
  float softcap;
  float m[kLanes];

  struct Lanes {
    Vec m, m_minus_lse, factor;
  };
  template <bool CAP>
  Lanes lanes(const Upstream& up, int64_t j) const {
    const Vec slope = load(up.inverse_temperature + j), largest = load(m + j);
    return {largest, sub(largest, load(up.lse + j)),
            CAP ? mul(slope, broadcast(softcap)) : slope};
  }
  template <bool CAP>
  Terms terms(const Lanes& lanes, int64_t v, int64_t j) const {
    const Vec below = Type::load_vec(logits + v * stride + j);
    return {CAP ? div(add(below, lanes.m), lanes.factor) : below, add(below, lanes.m_minus_lse)};
  }
};

// A panel's kept logits of a block. `copy` holds them if they do not lie side by side.
template <class Type>
inline KeptPanel<Type> kept_panel(const Problem& problem, Block block, int64_t token, float* copy) {
  typedef typename Type::Element Element;
  const int64_t live = min_of(problem.tokens - token, kLanes), n = problem.head->n;
  const Element* logits = static_cast<const Element*>(problem.kept_logits);
  KeptPanel<Type> panel = {};
  panel.softcap = problem.head->softcap;
  for (int64_t lane = 0; lane < live; ++lane) {
    panel.m[lane] = problem.kept_maxima[block.v0 / kBlock * n + problem.rows[token + lane]];
  }
  if (is_whole(problem, token)) {
    const KeptPlace place = kept_place(problem, block, token);
    panel.logits = logits + place.first;
    panel.stride = place.stride;
    return panel;
  }
  Element* out = reinterpret_cast<Element*>(copy);
  memset(out, 0, block.rows * kLanes * sizeof(Element));
  for (int64_t lane = 0; lane < live; ++lane) {
    const KeptPlace place = kept_place(problem, block, token + lane);
    for (int64_t v = 0; v < block.rows; ++v) {
      out[v * kLanes + lane] = logits[place.first + v * place.stride];
    }
  }
  panel.logits = out;
  panel.stride = kLanes;
  return panel;
}

// The gradient of one product x = hidden @ weight.T whose token is the row's target.
// 1 - p comes from expm1: subtracting a p near 1 would lose its digits.
template <bool CAP, bool ENTROPY>
inline float target_gradient(float t, float log_p, Upstream up, int64_t lane) {
  const float p = expf(log_p);
  float gradient = up.at_target[lane] * -expm1f(log_p) + up.of_lse[lane] * p + up.of_all[lane];
  if (ENTROPY) {
    const float bounded = log_p < kNothing ? kNothing : log_p;
    gradient -= up.of_entropy[lane] * (bounded + up.entropy[lane]) * p;
  }
  return CAP ? gradient * (1.0f - t * t) : gradient;
}

// Writes the gradients of the products of a panel into x, [rows][kLanes], in fp32. Logits: MadeAgain
// of the same x, or KeptPanel.
// targets belong to the panel's lanes; v0 is the vocabulary entry of row 0.
template <bool CAP, bool ENTROPY, class Logits>
inline void panel_gradient(const Logits& logits, float* x, int64_t rows, Upstream up, int64_t live,
                           const int64_t* targets, int64_t v0) {
  float at_target[kLanes];
  for (int64_t lane = 0; lane < min_of(live, kLanes); ++lane) {
    const int64_t v = targets[lane] - v0, j = lane / kWidth * kWidth;
    if (v < 0 || v >= rows) continue;
    const Terms terms = logits.template terms<CAP>(logits.template lanes<CAP>(up, j), v, j);
    float t[kWidth], log_p[kWidth];
    store(t, terms.t);
    store(log_p, terms.log_p);
    at_target[lane] = target_gradient<CAP, ENTROPY>(t[lane - j], log_p[lane - j], up, lane);
  }
  for (int64_t j = 0; j < live_vectors(live) * kWidth; j += kWidth) {
    const typename Logits::Lanes lanes = logits.template lanes<CAP>(up, j);
    const Vec of_p = load(up.of_p + j);
    const Vec entropy = load(up.entropy + j), of_entropy = load(up.of_entropy + j);
    const Vec of_all = load(up.of_all + j);
    for (int64_t v = 0; v < rows; ++v) {
      const Terms terms = logits.template terms<CAP>(lanes, v, j);
      const Vec t = terms.t;
      const Vec log_p = ENTROPY ? larger(broadcast(kNothing), terms.log_p) : terms.log_p;
      const Vec p = vector_exp(log_p);
      Vec gradient = of_p;
      if (ENTROPY) gradient = sub(of_p, mul(of_entropy, add(log_p, entropy)));
      gradient = fma(gradient, p, of_all);
      if (CAP) gradient = mul(gradient, fma(sub(zero(), t), t, broadcast(1.0f)));
      store(x + v * kLanes + j, gradient);
    }
  }
  for (int64_t lane = 0; lane < min_of(live, kLanes); ++lane) {
    const int64_t v = targets[lane] - v0;
    if (v >= 0 && v < rows) x[v * kLanes + lane] = at_target[lane];
  }
  if (live < kLanes) {  // lanes without a token: their logits were exp(bias - 0), maybe inf
    for (int64_t v = 0; v < rows; ++v) {
      memset(x + v * kLanes + live, 0, (kLanes - live) * sizeof(float));
    }
  }
  // Rows beyond the vocabulary take part in whole tiles.
  memset(x + rows * kLanes, 0, (round_up(rows, kTileRows) - rows) * kLanes * sizeof(float));
}

// Writes the entries that are known already over the gradients of a panel, [rows][kLanes], whose
// first lane is `token`.
inline void overwrite_entries(const Backward& job, int64_t block, int64_t token, float* x) {
  if (job.entries_of_block == nullptr) return;
  int64_t begin = job.entries_of_block[block], end = job.entries_of_block[block + 1];
  const int64_t stop = end;
  while (begin < end) {  // the first entry of this panel
    const int64_t middle = begin + (end - begin) / 2;
    if (job.entries[middle].token < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  for (; begin < stop && job.entries[begin].token < token + kLanes; ++begin) {
    const Entry& entry = job.entries[begin];
    x[entry.row * kLanes + entry.token - token] = entry.value;
  }
}

#ifdef AGRO_HAVE_DOT
// The gradients of a panel, rounded to bf16, in both orders the products need: pairs of rows
// (first half of the panel itself) and pairs of tokens (`gradient_rows`, [rows][kLanes / 2]).
inline void pair_panel(float* gradient, int64_t rows, float* gradient_rows) {
  for (int64_t v = 0; v < round_up(rows, kTileRows); v += 2) {
    for (int64_t j = 0; j < kLanes; j += kWidth) {
      const Vec even = load(gradient + v * kLanes + j), odd = load(gradient + (v + 1) * kLanes + j);
      uint16_t* row = reinterpret_cast<uint16_t*>(gradient_rows) + v * kLanes + j;
      store_bf16(row, even);
      store_bf16(row + kLanes, odd);
      store(gradient + v / 2 * kLanes + j, pair_of(even, odd));
    }
  }
}
#endif

}  // namespace
}  // namespace agro

#endif
