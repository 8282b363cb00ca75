// exp and tanh of a vector. Included after a simd_*.h.
#ifndef AGRO_VECTOR_MATH_H
#define AGRO_VECTOR_MATH_H

namespace agro {
namespace {

// x = n log 2 + r with |r| <= log(2) / 2; exp(x) = 2^n exp(r), exp(r) = 1 + r + r^2 P(r). P's share
// of the relative error is 2^-28. r is the sum of an exact part and a small one; the small one is
// added to r^2 P(r) first, so that only the last two additions round at the size of the result.
inline Vec vector_exp(Vec x) {
  // Results below the smallest normal number, 2^-126, are 0. The bounds keep n within its type;
  // with the constant first, a NaN stays.
  const Vec lowest = broadcast(-87.33654475f);
  const Vec bounded = larger(broadcast(-88.0f), smaller(broadcast(89.0f), x));
  const Vec n = round(mul(bounded, broadcast(1.44269504089f)));
  // log 2 in two parts; the first has 9 bits to spare, so n times it is exact.
  const Vec exact = fma(n, broadcast(-0.693359375f), bounded);
  const Vec small = mul(n, broadcast(2.12194440e-4f));
  const Vec r = add(exact, small);
  Vec p = broadcast(0.0013814465f);
  p = fma(p, r, broadcast(0.008368781f));
  p = fma(p, r, broadcast(0.041668393f));
  p = fma(p, r, broadcast(0.1666652f));
  p = fma(p, r, broadcast(0.49999994f));
  p = fma(p, mul(r, r), small);
  p = add(broadcast(1.0f), add(exact, p));
  return if_less(x, lowest, zero(), scale(p, n));
}

// Near 0 an odd polynomial, so that small arguments keep their relative precision; else
// 1 - 2 / (exp(2 |x|) + 1) with the sign of x.
inline Vec vector_tanh(Vec x) {
  const Vec size = magnitude(x), square = mul(x, x);
  Vec p = broadcast(-0.0057049906f);
  p = fma(p, square, broadcast(0.02063909f));
  p = fma(p, square, broadcast(-0.053739715f));
  p = fma(p, square, broadcast(0.13331442f));
  p = fma(p, square, broadcast(-0.3333328f));
  const Vec near = fma(mul(p, square), x, x);
  const Vec e = vector_exp(add(size, size));
  const Vec far = sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
  return if_less(size, broadcast(0.625f), near, with_sign_of(far, x));
}

}  // namespace
}  // namespace agro

#endif
