// The vector operations of the kernels in AVX-512 (F, BW, DQ, VL) with FMA and F16C.
// One such file is included into a translation unit; what each name must do: README.md.
#ifndef AGRO_SIMD_H
#define AGRO_SIMD_H

#include <immintrin.h>
#include <stdint.h>

namespace agro {
namespace {

typedef __m512 Vec;
constexpr int kWidth = 16;
// 12 x 2 accumulators, 2 operands and a broadcast: 27 of 32 registers.
constexpr int kTileRows = 12;
constexpr int kTileVecs = 2;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
inline Vec with_sign_of(Vec x, Vec sign) {
  return _mm512_or_ps(_mm512_abs_ps(x), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}

inline Vec load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i bf16_of(Vec x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void store_bf16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_of(x));
}
inline void store_fp16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#define AGRO_HAVE_STREAM 1
// Past the caches: for results that nobody reads soon. p is a multiple of the vector's size.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline void stream_bf16(uint16_t* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_of(x));
}
inline void stream_fp16(uint16_t* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void stream_end() { _mm_sfence(); }

#ifdef __AVX512BF16__
#define AGRO_HAVE_DOT 1
// c + a.lo * b.lo + a.hi * b.hi of the bf16 pairs in each 32-bit lane.
inline Vec dot(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Pairs of two bf16 rows: lane i is lo[i] | hi[i] << 16.
inline Vec pair_rows(const uint16_t* lo, const uint16_t* hi) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lo)));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(hi)));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
// The same of two fp32 vectors, rounded to bf16.
inline Vec pair_of(Vec lo, Vec hi) {
  const __m512i a = _mm512_cvtepu16_epi32(bf16_of(lo)), b = _mm512_cvtepu16_epi32(bf16_of(hi));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

}  // namespace
}  // namespace agro

#endif
