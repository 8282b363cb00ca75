// Copies of hidden and weight in the order in which the products read them, and the way back of
// dhidden and dweight. Included after gemm.h.
#ifndef AGRO_PACK_H
#define AGRO_PACK_H

namespace agro {
namespace {

#ifndef AGRO_HAVE_STREAM  // an instruction set without stores past the caches
inline void stream(float* p, Vec x) { store(p, x); }
inline void stream_bf16(uint16_t* p, Vec x) { store_bf16(p, x); }
inline void stream_fp16(uint16_t* p, Vec x) { store_fp16(p, x); }
inline void stream_end() {}
#endif

// The input types: loaded as fp32, stored with one rounding.
struct Float32 {
  typedef float Element;
  static Vec load_vec(const float* p) { return load(p); }
  static void store_vec(float* p, Vec x) { store(p, x); }
  static void stream_vec(float* p, Vec x) { stream(p, x); }
};
struct BFloat16 {
  typedef uint16_t Element;
  static Vec load_vec(const uint16_t* p) { return load_bf16(p); }
  static void store_vec(uint16_t* p, Vec x) { store_bf16(p, x); }
  static void stream_vec(uint16_t* p, Vec x) { stream_bf16(p, x); }
};
struct Float16 {
  typedef uint16_t Element;
  static Vec load_vec(const uint16_t* p) { return load_fp16(p); }
  static void store_vec(uint16_t* p, Vec x) { store_fp16(p, x); }
  static void stream_vec(uint16_t* p, Vec x) { stream_fp16(p, x); }
};

// The type in which logits of an input type are kept.
template <class In>
struct Kept {
  typedef Float16 Type;
};
template <>
struct Kept<Float32> {
  typedef Float32 Type;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The length of equal pieces of `total`, each at most `limit` and a multiple of `step`, which
// divides `limit`: a short last piece would waste the start of its sums.
inline int64_t piece_of(int64_t total, int64_t limit, int64_t step) {
  return round_up(ceil_div(total, max_of(1, ceil_div(total, limit))), step);
}

template <class In>
inline const typename In::Element* row_of(const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const typename In::Element*>(matrix) + row * stride;
}

// out[i] = row[i] as fp32 for i < count; 0 for count <= i < padded.
template <class In>
inline void widen(const typename In::Element* row, int64_t count, int64_t padded, float* out) {
  count = max_of(count, 0);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, In::load_vec(row + i));
  if (i < count) {
    typename In::Element part[kWidth] = {};
    float wide[kWidth];
    memcpy(part, row + i, (count - i) * sizeof(*row));
    store(wide, In::load_vec(part));
    memcpy(out + i, wide, (count - i) * sizeof(float));
  }
  if (count < padded) memset(out + count, 0, (padded - count) * sizeof(float));
}

// row[i] = values[i], rounded, for i < count. Past the caches where the address allows it.
template <class In>
inline void narrow(const float* values, int64_t count, typename In::Element* row, bool streamed) {
  int64_t i = 0;
  if (streamed && reinterpret_cast<uintptr_t>(row) % (kWidth * sizeof(*row)) == 0) {
    for (; i + kWidth <= count; i += kWidth) In::stream_vec(row + i, load(values + i));
  } else {
    for (; i + kWidth <= count; i += kWidth) In::store_vec(row + i, load(values + i));
  }
  if (i < count) {
    typename In::Element part[kWidth];
    float wide[kWidth] = {};
    memcpy(wide, values + i, (count - i) * sizeof(float));
    In::store_vec(part, load(wide));
    memcpy(row + i, part, (count - i) * sizeof(*row));
  }
}

// How a type's rows become units of a sum.
template <class In, class Sum>
struct Units {  // Sum is Single: a unit is a number
  // `padded` units from unit k0 of a row of d numbers, zeros after its end.
  static void along_row(const typename In::Element* row, int64_t d, int64_t k0, int64_t padded,
                        float* out) {
    widen<In>(row + k0, min_of(d - k0, padded), padded, out);
  }
  // The unit of row `rows[0]` in each of `padded` columns, zeros after `count`.
  static void across_rows(const typename In::Element* const* rows, int64_t count, int64_t padded,
                          float* out) {
    widen<In>(rows[0], rows[0] == nullptr ? 0 : count, padded, out);
  }
};

#ifdef AGRO_HAVE_DOT
template <>
struct Units<BFloat16, Pairs> {  // a unit is two neighbours
  static void along_row(const uint16_t* row, int64_t d, int64_t k0, int64_t padded, float* out) {
    const int64_t bytes = max_of(0, min_of((d - 2 * k0) * 2, padded * 4));
    if (bytes > 0) memcpy(out, row + 2 * k0, bytes);
    memset(reinterpret_cast<char*>(out) + bytes, 0, padded * 4 - bytes);
  }
  static void across_rows(const uint16_t* const* rows, int64_t count, int64_t padded, float* out) {
    static const uint16_t nothing[kWidth] = {};
    if (rows[0] == nullptr) count = 0;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      store(out + i, pair_rows(rows[0] + i, rows[1] == nullptr ? nothing : rows[1] + i));
    }
    for (; i < count; ++i) {
      const uint16_t pair[2] = {rows[0][i],
                                rows[1] == nullptr ? static_cast<uint16_t>(0) : rows[1][i]};
      memcpy(out + i, pair, sizeof(pair));
    }
    if (i < padded) memset(out + i, 0, (padded - i) * sizeof(float));
  }
};
#endif

// hidden_panels[panel][k][lane] of one panel: the rows of hidden, transposed.
template <class In, class Sum>
inline void pack_panel(const Problem& problem, int64_t panel) {
  const agro_head& head = *problem.head;
  const int64_t depth = max_of(1, ceil_div(head.d, Sum::kUnit));
  float* out = problem.hidden_panels + panel * depth * kLanes;
  for (int64_t k0 = 0; k0 < depth; k0 += kWidth) {
    float units[kLanes][kWidth];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t token = panel * kLanes + lane;
      if (token < problem.tokens) {
        Units<In, Sum>::along_row(row_of<In>(head.hidden, problem.rows[token], head.hidden_stride),
                                  head.d, k0, kWidth, units[lane]);
      } else {
        memset(units[lane], 0, sizeof(units[lane]));
      }
    }
    for (int64_t k = k0; k < min_of(k0 + kWidth, depth); ++k) {
      for (int64_t lane = 0; lane < kLanes; ++lane) out[k * kLanes + lane] = units[lane][k - k0];
    }
  }
}

// hidden_columns[column / kLanes][unit of tokens][column % kLanes] of one panel's tokens.
template <class In, class Sum>
inline void pack_columns(const Problem& problem, int64_t panel) {
  const agro_head& head = *problem.head;
  const int64_t units = problem.panels * kLanes / Sum::kUnit;
  const int64_t panel_units = kLanes / Sum::kUnit;
  for (int64_t u = panel * panel_units; u < (panel + 1) * panel_units; ++u) {
    const typename In::Element* rows[Sum::kUnit];
    for (int64_t i = 0; i < Sum::kUnit; ++i) {
      const int64_t token = u * Sum::kUnit + i;
      rows[i] = token < problem.tokens
                    ? row_of<In>(head.hidden, problem.rows[token], head.hidden_stride)
                    : nullptr;
    }
    for (int64_t d0 = 0; d0 < head.d; d0 += kLanes) {
      Units<In, Sum>::across_rows(rows, min_of(kLanes, head.d - d0), kLanes,
                                  problem.hidden_columns + (d0 / kLanes * units + u) * kLanes);
      for (int64_t i = 0; i < Sum::kUnit; ++i) {
        if (rows[i] != nullptr) rows[i] += kLanes;
      }
    }
  }
}

// weight_rows: units [k0, k0 + depth) of the block's rows, zero rows up to whole tiles.
template <class In, class Sum>
inline void pack_weight_rows(const agro_head& head, int64_t v0, int64_t rows, int64_t k0,
                             int64_t depth, float* out) {
  for (int64_t v = 0; v < rows; ++v) {
    Units<In, Sum>::along_row(row_of<In>(head.weight, v0 + v, head.weight_stride), head.d, k0,
                              depth, out + v * (kDepth + kPad));
  }
  for (int64_t v = rows; v < round_up(rows, kTileRows); ++v) {
    memset(out + v * (kDepth + kPad), 0, depth * sizeof(float));
  }
}

// weight_columns[d / kTileRows][unit of rows][d % kTileRows]: columns [d0, d0 + columns) of the
// block, zeros up to whole tiles. A tile is kColumnTile floats.
constexpr int64_t kColumnTile = kBlock * kTileRows + kPad;

template <class In, class Sum>
inline void pack_weight_columns(const agro_head& head, int64_t v0, int64_t rows, int64_t d0,
                                int64_t columns, float* out) {
  constexpr int64_t kStored = (kTileRows + kWidth - 1) / kWidth * kWidth;
  static_assert(kStored - kTileRows <= kPad, "the last row's surplus stays in its tile");
  float units[kColumns + kStored];
  for (int64_t v = 0; v < rows; v += Sum::kUnit) {
    const typename In::Element* pair[2] = {
        row_of<In>(head.weight, v0 + v, head.weight_stride) + d0,
        v + 1 < rows ? row_of<In>(head.weight, v0 + v + 1, head.weight_stride) + d0 : nullptr};
    Units<In, Sum>::across_rows(pair, columns, round_up(columns, kTileRows) + kStored - kTileRows,
                                units);
    // Whole vectors are stored; the next row's overwrite what is too much.
    float* tile = out + v / Sum::kUnit * kTileRows;
    for (int64_t d = 0; d < columns; d += kTileRows, tile += kColumnTile) {
      for (int64_t i = 0; i < kStored; i += kWidth) store(tile + i, load(units + d + i));
    }
  }
}

// --- Fetching ahead ------------------------------------------------------------------------------

// Bring one of `shares` shares of some memory into the second-level cache. The hardware follows a
// stream by itself, but every piece of a product starts a new one.
inline void prefetch_rows(const char* first, int64_t row_bytes, int64_t rows, int64_t bytes,
                          int64_t share, int64_t shares) {
  for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; ++row) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + row * row_bytes + i, 0, 2);
  }
}

inline void prefetch_floats(const float* first, int64_t count, int64_t share, int64_t shares) {
  for (int64_t i = count * share / shares; i < count * (share + 1) / shares; i += 16) {
    __builtin_prefetch(first + i, 0, 2);
  }
}

}  // namespace
}  // namespace agro

#endif
