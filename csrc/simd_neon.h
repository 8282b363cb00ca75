// The vector operations of the kernels in NEON (AArch64).
// One such file is included into a translation unit; what each name must do: README.md.
#ifndef AGRO_SIMD_H
#define AGRO_SIMD_H

#include <arm_neon.h>
#include <stdint.h>

namespace agro {
namespace {

typedef float32x4_t Vec;
constexpr int kWidth = 4;
// 6 x 4 accumulators, 4 operands and a broadcast: 29 of 32 registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec broadcast(float x) { return vdupq_n_f32(x); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec x) { vst1q_f32(p, x); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
// vmaxq_f32 would make a NaN of either operand; the second one is wanted.
inline Vec larger(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec smaller(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec round(Vec x) { return vrndnq_f32(x); }
inline Vec power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline Vec scale(Vec x, Vec n) {  // in two steps: 2^128 is not a float
  const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return mul(mul(x, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline Vec magnitude(Vec x) { return vabsq_f32(x); }
inline Vec with_sign_of(Vec x, Vec sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, x); }

inline Vec load_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline Vec load_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_bf16(uint16_t* p, Vec x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t rounded = vbslq_u32(vceqq_f32(x, x), sum, vdupq_n_u32(0x7fc00000));
  vst1_u16(p, vshrn_n_u32(rounded, 16));
}
inline void store_fp16(uint16_t* p, Vec x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

}  // namespace
}  // namespace agro

#endif
