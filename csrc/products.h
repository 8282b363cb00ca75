// The three products of one vocabulary block: logits, dhidden and dweight. Which operand of
// gemm.h is which matrix is said there. Included after epilogue.h.
#ifndef AGRO_PRODUCTS_H
#define AGRO_PRODUCTS_H

namespace agro {
namespace {

constexpr int64_t kPanelsOfSlice = kSlice / kLanes;

static_assert(kBlock % kTileRows == 0 && kColumns % kTileRows == 0, "blocks are whole tiles");
static_assert(kChunk % kLanes == 0 && kSlice % kLanes == 0, "chunks are whole panels");

inline Block block_of(const Problem& problem, int64_t index) {
  const int64_t v0 = index * kBlock;
  return {v0, min_of(kBlock, problem.head->v - v0)};
}

// The products of a single small panel straight from weight: its rows are read once, so a copy
// would not pay. The sums are those of `block_products`, term by term.
template <class In, class Sum>
inline void few_products(const Problem& problem, const Scratch& scratch, Block block) {
  const agro_head& head = *problem.head;
  const int64_t depth = ceil_div(head.d, Sum::kUnit);
  const int64_t piece = piece_of(depth, kDepth, 1);
  const int64_t row_bytes = head.weight_stride * sizeof(typename In::Element);
  for (int64_t v = 0; v + kTileRows <= block.rows; v += kTileRows) {
    const char* rows =
        reinterpret_cast<const char*>(row_of<In>(head.weight, block.v0 + v, head.weight_stride));
    for (int64_t k0 = 0; k0 < depth; k0 += piece) {
      panel_tile<Sum, 0, 1>(problem.tokens, rows + 4 * k0, row_bytes,
                            problem.hidden_panels + k0 * kLanes, min_of(piece, depth - k0),
                            scratch.logits + v * kLanes, k0 > 0);
    }
  }
}

// logits[panel][v][lane] = sum over D, for `panels` panels from `panel0`.
// next_v0: the block that comes after this one, or -1; its rows are fetched ahead.
// finish(i) is called when panel i is complete: the epilogue finds it in the cache.
template <class In, class Sum, class Finish>
inline void block_products(const Problem& problem, const Scratch& scratch, Block block,
                           int64_t next_v0, int64_t panel0, int64_t panels, Finish finish) {
  const agro_head& head = *problem.head;
  const int64_t depth = max_of(1, ceil_div(head.d, Sum::kUnit));
  const int64_t unit_bytes = Sum::kUnit * sizeof(typename In::Element);
  const int64_t row_bytes = head.weight_stride * sizeof(typename In::Element);
  // Whole tiles are read in place, if an element is an operand as it lies there.
  const bool in_place =
      problem.tokens <= kWidth && unit_bytes == 4 && head.d > 0 && head.d % Sum::kUnit == 0;
  const int64_t first_v = in_place ? block.rows / kTileRows * kTileRows : 0;
  if (in_place) few_products<In, Sum>(problem, scratch, block);
  if (first_v == block.rows) {
    finish(0);
    return;
  }
  const int64_t piece = piece_of(depth, kDepth, 1), tiles = ceil_div(block.rows, kTileRows);
  for (int64_t k0 = 0; k0 < depth; k0 += piece) {
    const int64_t k = min_of(piece, depth - k0);
    pack_weight_rows<In, Sum>(head, block.v0 + first_v, block.rows - first_v, k0, k,
                              scratch.weight_rows);
    const bool last = k0 + piece >= depth;
    const int64_t next_row = last ? next_v0 : block.v0, next_k0 = last ? 0 : k0 + piece;
    const int64_t next_rows = next_row < 0 ? 0 : min_of(kBlock, head.v - next_row);
    const int64_t next_bytes = min_of(piece, depth - next_k0) * unit_bytes;
    const char* next = static_cast<const char*>(head.weight) + next_k0 * unit_bytes +
                       (next_rows > 0 ? next_row * row_bytes : 0);
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t panel = panel0 + i;
      const float* b = problem.hidden_panels + (panel * depth + k0) * kLanes;
      prefetch_rows(next, row_bytes, next_rows, next_bytes, i, panels);
      for (int64_t v = 0; v < block.rows - first_v; v += kTileRows) {
        if (i + 1 < panels) prefetch_floats(b + depth * kLanes, k * kLanes, v / kTileRows, tiles);
        panel_tile<Sum, kDepth + kPad, 1>(
            problem.tokens - panel * kLanes,
            reinterpret_cast<const char*>(scratch.weight_rows + v * (kDepth + kPad)), 0, b, k,
            scratch.logits + (i * kBlock + first_v + v) * kLanes, k0 > 0);
      }
      if (last) finish(i);
    }
  }
}

// Fetches one of `shares` shares of a piece of the block's weight ahead: the columns from d0.
template <class In>
inline void prefetch_weight_columns(const agro_head& head, Block block, int64_t d0, int64_t share,
                                    int64_t shares) {
  constexpr int64_t kBytes = sizeof(typename In::Element);
  if (d0 >= head.d) return;
  const int64_t columns = min_of(piece_of(head.d, kColumns, kTileRows), head.d - d0);
  const auto* first = row_of<In>(head.weight, block.v0, head.weight_stride) + d0;
  prefetch_rows(reinterpret_cast<const char*>(first), head.weight_stride * kBytes, block.rows,
                columns * kBytes, share, shares);
}

// sum.panels[panel][d][lane] (+)= sum over the block's rows.
// unread: no product has brought the block's weight into the caches yet, so it is fetched ahead.
template <class In, class Sum>
inline void dhidden_product(const Problem& problem, const Scratch& scratch, Block block,
                            int64_t panel0, int64_t panels, const DhiddenSum& sum, bool unread) {
  const agro_head& head = *problem.head;
  const int64_t all_columns = round_up(head.d, kTileRows);
  const int64_t piece = piece_of(head.d, kColumns, kTileRows), pieces = ceil_div(head.d, piece);
  const int64_t k = ceil_div(block.rows, Sum::kUnit);
  for (int64_t d0 = 0; d0 < head.d; d0 += piece) {
    const int64_t columns = min_of(piece, head.d - d0), tiles = ceil_div(columns, kTileRows);
    pack_weight_columns<In, Sum>(head, block.v0, block.rows, d0, columns, scratch.weight_columns);
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t panel = panel0 + i;
      const float* b = scratch.logits + i * kBlock * kLanes;
      float* c = sum.panels + (panel * all_columns + d0) * kLanes;
      int32_t* added = sum.added == nullptr ? nullptr : sum.added + panel * pieces + d0 / piece;
      if (unread) prefetch_weight_columns<In>(head, block, d0 + piece, i, panels);
      if (added != nullptr) wait_for(added, sum.before);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* a = scratch.weight_columns + tile * kColumnTile;
        if (i + 1 < panels) prefetch_floats(b + kBlock * kLanes, k * kLanes, tile, tiles);
        panel_tile<Sum, 1, kTileRows>(problem.tokens - panel * kLanes,
                                      reinterpret_cast<const char*>(a), 0, b, k,
                                      c + tile * kTileRows * kLanes, sum.before > 0);
      }
      if (added != nullptr) __atomic_store_n(added, sum.before + 1, __ATOMIC_RELEASE);
    }
  }
}

// The gradient of the block's rows of weight: a sum over the chunk's tokens, added to what earlier
// chunks left in dweight_tiles, and written out after the last one.
template <class In, class Sum>
inline void dweight_product(const Backward& job, const Scratch& scratch, Block block,
                            int64_t panel0, int64_t panels) {
  const agro_head& head = *job.head;
  const int64_t panel_units = kLanes / Sum::kUnit;
  const int64_t units = job.panels * panel_units;
  const float* gradient = Sum::kUnit == 1 ? scratch.logits : scratch.gradient_rows;
  const bool last = panel0 + panels == job.panels;
  for (int64_t d0 = 0; d0 < head.d; d0 += kSlice) {
    const int64_t tiles = ceil_div(min_of(kSlice, head.d - d0), kLanes);
    // One chunk of tokens needs the tiles of one piece of the columns only.
    float* c =
        scratch.dweight_tiles + (job.panels <= job.chunk_panels ? 0 : d0 / kLanes * kBlock * kLanes);
    for (int64_t i0 = 0; i0 < panels; i0 += kPanelsOfSlice) {
      const int64_t slice_units = min_of(kPanelsOfSlice, panels - i0) * panel_units;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* b = job.hidden_columns +
                         ((d0 / kLanes + tile) * units + (panel0 + i0) * panel_units) * kLanes;
        for (int64_t v = 0; v < block.rows; v += kTileRows) {
          if (tile + 1 < tiles) {
            prefetch_floats(b + units * kLanes, slice_units * kLanes, v, block.rows);
          }
          product_tile<Sum, kTileVecs, kLanes / Sum::kUnit, 1>(
              reinterpret_cast<const char*>(gradient + (i0 * kBlock + v) * panel_units), 0, b,
              slice_units, panel_units, kBlock * panel_units, c + (tile * kBlock + v) * kLanes,
              panel0 + i0 > 0);
        }
      }
    }
    if (!last) continue;
    for (int64_t v = 0; v < block.rows; ++v) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t d = d0 + tile * kLanes, count = min_of(kLanes, head.d - d);
        const float* values = c + (tile * kBlock + v) * kLanes;
        const int64_t at = (block.v0 + v) * head.d + d;
        if (job.weight_grad == nullptr) {
          narrow<In>(values, count, static_cast<typename In::Element*>(job.dweight) + at, true);
          continue;
        }
        float* sum = job.weight_grad + at;
        int64_t lane = 0;
        for (; lane + kWidth <= count; lane += kWidth) {
          store(sum + lane, add(load(sum + lane), load(values + lane)));
        }
        for (; lane < count; ++lane) sum[lane] += values[lane];
      }
    }
  }
}

}  // namespace
}  // namespace agro

#endif
