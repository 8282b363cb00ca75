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

// --- Backward ------------------------------------------------------------------------------------

// The coefficients of a panel's lanes; see Backward.
struct Upstream {
  const float *inverse_temperature, *lse, *entropy, *at_target, *of_p, *of_lse, *of_entropy;
};

inline Upstream upstream_of(const Backward& job, int64_t token) {
  return {job.inverse_temperature + token, job.lse + token,  job.entropy + token,
          job.at_target + token,           job.of_p + token, job.of_lse + token,
          job.of_entropy + token};
}

// The gradient of one product x = hidden @ weight.T whose token is the row's target.
// 1 - p comes from expm1: subtracting a p near 1 would lose its digits.
template <bool CAP, bool ENTROPY>
inline float target_gradient(float x, float softcap, Upstream up, int64_t lane) {
  float t[kWidth];
  store(t, capped<CAP>(broadcast(x), softcap));
  const float factor = up.inverse_temperature[lane] * (CAP ? softcap : 1.0f);
  const float log_p = t[0] * factor - up.lse[lane];
  const float p = expf(log_p);
  float gradient = up.at_target[lane] * -expm1f(log_p) + up.of_lse[lane] * p;
  if (ENTROPY) {
    const float bounded = log_p < kNothing ? kNothing : log_p;
    gradient -= up.of_entropy[lane] * (bounded + up.entropy[lane]) * p;
  }
  return CAP ? gradient * (1.0f - t[0] * t[0]) : gradient;
}

// Turns the products x of a panel, [rows][kLanes], into their gradients, in fp32.
// targets belong to the panel's lanes; v0 is the vocabulary entry of row 0.
template <bool CAP, bool ENTROPY>
inline void panel_gradient(float* x, int64_t rows, const float* bias, float softcap, Upstream up,
                           int64_t live, const int64_t* targets, int64_t v0) {
  float at_target[kLanes];
  for (int64_t lane = 0; lane < min_of(live, kLanes); ++lane) {
    const int64_t v = targets[lane] - v0;
    if (v < 0 || v >= rows) continue;
    at_target[lane] =
        target_gradient<CAP, ENTROPY>(x[v * kLanes + lane] + bias[v], softcap, up, lane);
  }
  for (int64_t j = 0; j < live_vectors(live) * kWidth; j += kWidth) {
    const Vec slope = load(up.inverse_temperature + j);
    const Vec factor = CAP ? mul(slope, broadcast(softcap)) : slope;
    const Vec lse = load(up.lse + j), of_p = load(up.of_p + j);
    const Vec entropy = load(up.entropy + j), of_entropy = load(up.of_entropy + j);
    for (int64_t v = 0; v < rows; ++v) {
      const Vec t = capped<CAP>(add(load(x + v * kLanes + j), broadcast(bias[v])), softcap);
      Vec log_p = sub(mul(t, factor), lse);
      if (ENTROPY) log_p = larger(broadcast(kNothing), log_p);
      const Vec p = vector_exp(log_p);
      Vec gradient = of_p;
      if (ENTROPY) gradient = sub(of_p, mul(of_entropy, add(log_p, entropy)));
      gradient = mul(gradient, p);
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
