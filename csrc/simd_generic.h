// The vector operations of the kernels without instructions of any particular CPU: vectors of four
// floats in the compiler's own extension, which it lowers to whatever the baseline target has.
// One such file is included into a translation unit; what each name must do: README.md.
#ifndef AGRO_SIMD_H
#define AGRO_SIMD_H

#include <stdint.h>
#include <string.h>

namespace agro {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

// The same bits as another type of the same size.
template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  memcpy(&result, &x, sizeof(result));
  return result;
}
inline Bits bits_of(Vec x) { return bits_as<Bits>(x); }
inline Vec floats_of(Bits bits) { return bits_as<Vec>(bits); }
inline Bits broadcast_bits(int32_t x) { return Bits{x, x, x, x}; }

inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }
inline Vec choose(Bits mask, Vec yes, Vec no) {
  return floats_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // rounded twice
inline Vec larger(Vec a, Vec b) { return choose(Bits(a > b), a, b); }
inline Vec smaller(Vec a, Vec b) { return choose(Bits(a < b), a, b); }
inline Vec magnitude(Vec x) { return floats_of(bits_of(x) & broadcast_bits(0x7fffffff)); }
inline Vec with_sign_of(Vec x, Vec sign) {
  return floats_of(bits_of(magnitude(x)) | (bits_of(sign) & broadcast_bits(INT32_MIN)));
}
inline Vec round(Vec x) {  // for |x| < 2^22: 1.5 * 2^23 leaves no bits for a fraction
  const Vec shift = broadcast(12582912.0f);
  return (x + shift) - shift;
}
inline Vec scale(Vec x, Vec n) {  // in two steps: 2^128 is not a float
  const Vec shift = broadcast(12582912.0f);
  const Bits whole = bits_of(n + shift) - bits_of(shift), half = whole >> 1;
  const Bits one = broadcast_bits(127);
  return x * floats_of((half + one) << 23) * floats_of((whole - half + one) << 23);
}
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return choose(Bits(a < b), yes, no); }

inline float float_of_bf16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
inline uint16_t bf16_of_float(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float float_of_fp16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // inf, NaN
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {  // normal: the exponent bias changes from 15 to 127
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // a multiple of 2^-24
    bits = sign | bits_as<uint32_t>(static_cast<float>(magnitude) * 5.9604644775390625e-8f);
  }
  return bits_as<float>(bits);
}
inline uint16_t fp16_of_float(float x) {
  uint32_t bits = bits_as<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to inf
  if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    // The last bit of 0.5 is 2^-24, so the sum is rounded to a multiple of it.
    bits = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - (112u << 23)) >> 13);
}

inline Vec load_bf16(const uint16_t* p) {
  return Vec{float_of_bf16(p[0]), float_of_bf16(p[1]), float_of_bf16(p[2]), float_of_bf16(p[3])};
}
inline Vec load_fp16(const uint16_t* p) {
  return Vec{float_of_fp16(p[0]), float_of_fp16(p[1]), float_of_fp16(p[2]), float_of_fp16(p[3])};
}
inline void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < kWidth; ++i) p[i] = bf16_of_float(x[i]);
}
inline void store_fp16(uint16_t* p, Vec x) {
  for (int i = 0; i < kWidth; ++i) p[i] = fp16_of_float(x[i]);
}

}  // namespace
}  // namespace agro

#endif
