// What the ops (linear_logprobs.cpp) and the instruction sets (isa_*.cpp) agree on: plain data and
// a table of functions. No templates and no inline functions: the linker would keep one copy of
// each, perhaps the one that was compiled for a newer CPU.
#ifndef AGRO_KERNELS_H
#define AGRO_KERNELS_H

#include <stdint.h>

#include "agro_cpu.h"

namespace agro {

// Sizes of the tiles; README.md says where each lives in the caches.
constexpr int64_t kBlock = AGRO_KEPT_TILE;  // vocabulary rows of a block; a multiple of every tile's rows
constexpr int64_t kSpan = 4;       // blocks whose statistics are merged before they are stored
constexpr int64_t kDepth = 256;    // units of a sum over D that are added up in registers
constexpr int64_t kColumns = 288;  // columns of weight in one piece of the dhidden product
constexpr int64_t kPad = 16;       // floats after a copied row: rows 2^n apart share a cache set
constexpr int64_t kSlice = 256;    // tokens of a sum over tokens that are added up in registers;
                                   // also the columns of one piece of the dweight product
constexpr int64_t kChunk = 2048;   // tokens whose logits of a block exist at the same time, at most
constexpr int64_t kKeptRows = 32;  // rows whose kept logits lie side by side; a multiple of the lanes
constexpr int32_t kSums = 4;       // sums of dhidden that threads add to, at most

// The tokens that count, in panels of `lanes`; the last panel is padded with zeros.
// A unit is 4 bytes of an operand: one fp32 number or a pair of bf16 numbers.
struct Problem {
  const agro_head* head;
  int64_t tokens;
  int64_t panels;
  const int64_t* rows;               // (tokens,): which row of hidden each one is
  const int64_t* targets;            // (panels * lanes,), -1 in the padding
  const float* inverse_temperature;  // (panels * lanes,), 1 in the padding
  float* hidden_panels;              // [panels][units of D][lanes]
  float* hidden_columns;             // [columns / lanes][units of tokens][lanes]; NULL: no dweight
  // Logits that the forward pass keeps: of the first kept_blocks blocks.
  int64_t kept_blocks;
  void* kept_logits;   // [blocks][rows of hidden / kKeptRows][kBlock][kKeptRows]; see kept_place
  float* kept_maxima;  // [blocks][rows of hidden]
};

struct Forward : Problem {
  bool with_entropy;
  float* statistics;  // [spans][3][panels * lanes]: largest logit m, sum e^(z-m), sum e^(z-m)(z-m)
  float* target_logits;  // (panels * lanes,), NaN until found
  float* logprobs;       // (N,), outputs
  float* lse;
  float* entropy;
};

// An entry of the logits' gradient that is known already.
struct Entry {
  int32_t token;  // of the tokens that count
  int32_t row;    // of its block
  float value;
};

// The coefficients of one row's
// dz = of_p p - of_entropy p (log p + entropy) + at_target 1[target] + of_all, each already divided by the temperature. (panels * lanes,), zeros in the padding.
struct Backward : Problem {
  bool with_entropy;
  const float* lse;
  const float* entropy;
  const float* at_target;   // dlogprob
  const float* of_p;        // dlse - dlogprob
  const float* of_lse;      // dlse
  const float* of_entropy;  // dentropy
  const float* of_all;      // dsum
  void* dhidden;            // outputs
  void* dweight;
  void* dbias;
  float* weight_grad;
  float* const* dhidden_panels;  // (dhidden_parts,): sums, each [panels][columns][lanes]
  int32_t dhidden_parts;
  const Entry* entries;  // by block, and in a block by token
  const int64_t* entries_of_block;  // (blocks + 1,): where a block's begin; NULL: there are none
  int64_t chunk_panels;  // panels whose logits of a block exist at the same time: whole slices
};

// The sum of dhidden that a block is added to. Where several threads share it, a block waits at
// each piece until those before it have been added there: the order of a sum is that of its blocks.
struct DhiddenSum {
  float* panels;   // [panels][columns][lanes]; NULL: dhidden is not wanted
  int32_t before;  // blocks that are added to it before this one
  int32_t* added;  // [panels][pieces of D]: blocks that have been added; NULL: one thread's own sum
};

// Returns when *count, which another thread raises, is at_least. In team.cpp.
void wait_for(const int32_t* count, int32_t at_least);

// What one thread works in.
struct Scratch {
  float* weight_rows;     // [kBlock][kDepth + kPad] units
  float* weight_columns;  // [kColumns / tile_rows][kBlock in units * tile_rows + kPad] units
  float* bias;            // (kBlock,)
  float* logits;          // [panels of a chunk][kBlock][lanes]; the gradient replaces them
  float* gradient_rows;   // [panels of a chunk][kBlock][lanes in units]; NULL if not needed
  float* dweight_tiles;   // [columns / lanes][kBlock][lanes]
  float* dbias_lanes;     // [kBlock][lanes]
};

// The functions for one dtype of hidden and weight.
struct DtypeKernels {
  int64_t unit;  // numbers in a unit: 1, or 2 for bf16 pairs
  void (*pack_hidden)(const Problem&, int64_t panel_begin, int64_t panel_end);
  void (*forward_span)(const Forward&, const Scratch&, int64_t span);
  void (*backward_block)(const Backward&, const Scratch&, int64_t block, int64_t next_block,
                         const DhiddenSum&);
  void (*dhidden_result)(const Backward&, int64_t panel_begin, int64_t panel_end);
};

// One instruction set.
struct Kernels {
  const char* isa;
  int64_t lanes;             // tokens of a panel; columns of a dweight tile
  int64_t tile_rows;         // rows of a tile
  DtypeKernels of_dtype[3];  // at agro_head.dtype
  void (*forward_result)(const Forward&, int64_t panel_begin, int64_t panel_end);
  void (*exp)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
};

extern const Kernels avx512bf16_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx2_kernels;
extern const Kernels neon_kernels;
extern const Kernels scalar_kernels;

}  // namespace agro

#endif
