// The one product kernel: a tile of C (+)= A B in registers. Included after a simd_*.h.
//
// All three products of the head have this form. A is read one unit at a time and broadcast over
// the lanes, B is read as vectors, C is [kTileRows][kLanes] in one piece.
//
//     product                  rows    lanes    summed over    A                B
//     logits                   v       tokens   units of D     weight rows      hidden panels
//     dhidden (transposed)     d       tokens   units of v     weight columns   gradient panels
//     dweight                  v       d        units of t     gradient rows    hidden columns
#ifndef AGRO_GEMM_H
#define AGRO_GEMM_H

#include <string.h>

namespace agro {
namespace {

constexpr int64_t kLanes = kTileVecs * kWidth;

// A sum of fp32 numbers.
struct Single {
  static constexpr int64_t kUnit = 1;
  static Vec add_product(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#ifdef AGRO_HAVE_DOT
// A sum of pairs of bf16 numbers, in fp32.
struct Pairs {
  static constexpr int64_t kUnit = 2;
  static Vec add_product(Vec a, Vec b, Vec c) { return dot(a, b, c); }
};
#endif

inline Vec broadcast_unit(const char* p) {
  float unit;
  memcpy(&unit, p, sizeof(unit));  // rows of weight itself may start at any even address
  return broadcast(unit);
}

// C (+)= A B over k units; the first VECS vectors of the lanes.
//
// a: unit (row, k) lies at a + 4 * (row * ROW + k * STEP) bytes, with row_bytes instead of 4 * ROW
//    if ROW is 0. After every `segment` units a moves on by `segment_floats` instead.
// The sum starts at zero and is added to C at the end: many short sums err less than a long one.
template <class Sum, int VECS, int64_t ROW, int64_t STEP>
inline __attribute__((always_inline)) void product_tile(const char* a, int64_t row_bytes,
                                                        const float* b, int64_t k, int64_t segment,
                                                        int64_t segment_floats, float* c,
                                                        bool add_to_c) {
  Vec sum[kTileRows][VECS];
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) sum[row][j] = zero();
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) __builtin_prefetch(c + row * kLanes + j * kWidth, 1);
  }
  while (k > 0) {
    const int64_t steps = k < segment ? k : segment;
    const char* unit = a;
    for (int64_t step = 0; step < steps; ++step) {
      Vec operand[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) operand[j] = load(b + j * kWidth);
#pragma GCC unroll 16
      for (int row = 0; row < kTileRows; ++row) {
        const Vec factor = broadcast_unit(unit + row * (ROW == 0 ? row_bytes : 4 * ROW));
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) {
          sum[row][j] = Sum::add_product(factor, operand[j], sum[row][j]);
        }
      }
      unit += 4 * STEP;
      b += kLanes;
    }
    k -= steps;
    a += 4 * segment_floats;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      float* p = c + row * kLanes + j * kWidth;
      store(p, add_to_c ? add(load(p), sum[row][j]) : sum[row][j]);
    }
  }
}

// product_tile for a panel of which `live` lanes hold tokens: half the work if one vector holds
// them all. Each lane's sum is the same either way.
template <class Sum, int64_t ROW, int64_t STEP>
inline void panel_tile(int64_t live, const char* a, int64_t row_bytes, const float* b, int64_t k,
                       float* c, bool add_to_c) {
  if (live <= kWidth) {
    product_tile<Sum, 1, ROW, STEP>(a, row_bytes, b, k, k, 0, c, add_to_c);
  } else {
    product_tile<Sum, kTileVecs, ROW, STEP>(a, row_bytes, b, k, k, 0, c, add_to_c);
  }
}

}  // namespace
}  // namespace agro

#endif
