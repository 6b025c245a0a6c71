// Products with block-quantised weights, read as they are stored.
//
// A panel's 32-bit word holds 32 / bits columns of one row, its 16 words stand side by side, so a vector of words is
// as many rows at the same columns. Byte i of a word holds columns i, i + 4, i + 8 ... with the lowest bits first:
// masking gives four consecutive columns as bytes, which is what integer dot products take.
#include "gemm.h"
#include "scratch.h"
#include "tasks.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

// Rows of x up to which codes are decoded in registers for each; above, panels are dequantised to a buffer.
constexpr int kFewRows = 4;

// Bit at which column c of a word begins.
constexpr int shift_of(int bits, int c) { return 8 * (c % 4) + bits * (c / 4); }

constexpr int per_word(int bits) { return 32 / bits; }

// Column c of a word as floats, times 2^shift: masking in place saves the shift, except for the column that ends at
// the sign bit, which is shifted down instead.
template <int kBits>
EDGE_INLINE Float scaled_code(Word words, int c) {
  const int shift = shift_of(kBits, c);
  if (shift + kBits == 32) return to_float(reinterpret_cast<Int>(words >> shift));
  return to_float(reinterpret_cast<Int>(words & (((1u << kBits) - 1) << shift)));
}

// 2^-shift, the factor that undoes the one above.
template <int kBits>
constexpr float unscale(int c) {
  const int shift = shift_of(kBits, c);
  return shift + kBits == 32 ? 1.0f : 1.0f / static_cast<float>(1u << shift);
}

struct Layout {
  int64_t words, blocks;  // a panel's, of 16 words and of one block

  explicit Layout(const QuantizedWeight& w)
      : words(ceil_div(w.columns, w.block) * w.block * w.bits / 32), blocks(ceil_div(w.columns, w.block)) {}
};

EDGE_INLINE Float zero_points(const QuantizedWeight& w, int64_t at) {
  return w.zeros ? from_bytes(w.zeros + at) : splat(static_cast<float>(1 << (w.bits - 1)));
}

EDGE_INLINE void finish(Float total, const float* bias, float* y, int count) {
  if (count <= 0) return;
  const int there = std::min(kLanes, count);
  if (bias) total += load_part(bias, there);
  store_part(y, total, there);
}

// --- exact, few rows of x -------------------------------------------------------------------------------------------

// Rows of x times 2^-shift of their column, padded with zeros to whole blocks, and their sums over the blocks.
struct Unscaled {
  const float* rows;
  const float* sums;
};

struct UnscaledRows;
struct UnscaledSums;

template <int kBits>
Unscaled unscaled(const float* x, const QuantizedWeight& w, const Layout& layout, int m) {
  const int64_t padded = layout.blocks * w.block;
  float* rows = scratch<UnscaledRows, float>(static_cast<size_t>(padded * m));
  float* sums = scratch<UnscaledSums, float>(static_cast<size_t>(layout.blocks * m));
  alignas(64) float factors[16];
  for (int c = 0; c < 16; ++c) factors[c] = unscale<kBits>(c % per_word(kBits));
  for (int r = 0; r < m; ++r)
    for (int64_t g = 0; g < layout.blocks; ++g) {
      const float* from = x + static_cast<int64_t>(r) * w.columns + g * w.block;
      float* to = rows + r * padded + g * w.block;
      const int there = static_cast<int>(std::min<int64_t>(w.block, w.columns - g * w.block));
      Float total{};
      int c = 0;
      for (; c + kLanes <= there; c += kLanes) {
        const Float value = load(from + c);
        total += value;
        store(to + c, value * load(factors + c % 16));
      }
      float sum_there = sum(total);
      for (; c < there; ++c) {
        sum_there += from[c];
        to[c] = from[c] * factors[c % 16];
      }
      for (; c < w.block; ++c) to[c] = 0;
      sums[r * layout.blocks + g] = sum_there;
    }
  return {rows, sums};
}

// kRows rows of x against kWide panels from `panel` on. Several sums each, over every second or fourth column, hide the
// latency.
template <int kBits, int kRows, int kWide>
void exact_product(const Unscaled& x, const QuantizedWeight& w, const Layout& layout, int64_t panel,
                   const float* bias, float* y, int count) {
  constexpr int kVectors = kWide * kParts, kWord = per_word(kBits), kChains = kRows * kVectors <= 2 ? 4 : 2;
  const int64_t padded = layout.blocks * w.block;
  const int words = w.block / kWord;
  const uint32_t* codes = w.codes + panel * layout.words * kPanel;
  Float result[kRows][kVectors] = {};
  for (int64_t g = 0; g < layout.blocks; ++g) {
    Float total[kRows][kVectors][kChains] = {};
    for (int j = 0; j < words; ++j) {
      const int64_t word = g * words + j;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Word packed = load<Word>(codes + (v / kParts * layout.words + word) * kPanel + v % kParts * kLanes);
#pragma GCC unroll 16
        for (int c = 0; c < kWord; ++c) {
          const Float code = scaled_code<kBits>(packed, c);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
            total[r][v][c % kChains] += code * splat(x.rows[r * padded + word * kWord + c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = ((panel + v / kParts) * layout.blocks + g) * kPanel + v % kParts * kLanes;
      const Float scale = load(w.scales + at), zero = zero_points(w, at);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Float all = total[r][v][0] + total[r][v][1];
        for (int c = 2; c < kChains; ++c) all += total[r][v][c];
        result[r][v] += (all - zero * x.sums[r * layout.blocks + g]) * scale;
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      finish(result[r][v], bias ? bias + v * kLanes : nullptr, y + static_cast<int64_t>(r) * w.rows + v * kLanes,
             count - v * kLanes);
}

// --- exact, many rows -----------------------------------------------------------------------------------------------

// Columns [k, k + depth) of one panel as floats [depth, 16].
template <int kBits>
void dequantize(const QuantizedWeight& w, const Layout& layout, int64_t panel, int64_t k, int64_t depth, float* to) {
  constexpr int kWord = per_word(kBits);
  for (int64_t c = 0; c < depth; c += kWord) {
    const int64_t word = (k + c) / kWord, block = (k + c) / w.block;
    const int there = static_cast<int>(std::min<int64_t>(kWord, depth - c));
    for (int v = 0; v < kParts; ++v) {
      const Word packed = load<Word>(w.codes + (panel * layout.words + word) * kPanel + v * kLanes);
      const int64_t at = (panel * layout.blocks + block) * kPanel + v * kLanes;
      const Float scale = load(w.scales + at), zero = zero_points(w, at);
      for (int i = 0; i < there; ++i) {
        const Word code = (packed >> shift_of(kBits, i)) & ((1u << kBits) - 1);
        store(to + (c + i) * kPanel + v * kLanes, (to_float(reinterpret_cast<Int>(code)) - zero) * scale);
      }
    }
  }
}

// --- fast -----------------------------------------------------------------------------------------------------------

// Rows of x as int8 with one scale a block, padded with zeros to whole blocks.
struct Rounded {
  const int8_t* rows;
  const float* scales;
  const float* sums;  // of a block's rounded values
};

struct RoundedRows;
struct RoundedScales;

Rounded rounded(const float* x, const QuantizedWeight& w, const Layout& layout, int m) {
  const int64_t padded = layout.blocks * w.block, blocks = layout.blocks;
  int8_t* rows = scratch<RoundedRows, int8_t>(static_cast<size_t>(padded * m));
  float* scales = scratch<RoundedScales, float>(static_cast<size_t>(2 * blocks * m));
  float* sums = scales + blocks * m;
  for (int r = 0; r < m; ++r)
    for (int64_t g = 0; g < blocks; ++g) {
      const float* from = x + static_cast<int64_t>(r) * w.columns + g * w.block;
      int8_t* to = rows + r * padded + g * w.block;
      const int there = static_cast<int>(std::min<int64_t>(w.block, w.columns - g * w.block));
      Float sizes{};
      each_vector(there, [&](int64_t c, int count) {
        const Float value = load_up_to(from + c, count);
        sizes = max(max(sizes, value), -value);
      });
      float largest = 0;
      for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, sizes[lane]);
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      Float total{};
      std::memset(to + there, 0, static_cast<size_t>(w.block - there));
      each_vector(there, [&](int64_t c, int count) {
        // Rounded to nearest, halves to even, as the current mode has it.
        const Float value = (load_up_to(from + c, count) * inverse + kRounder) - kRounder;
        total += value;
        store_bytes(to + c, to_int(value), count);
      });
      scales[r * blocks + g] = largest / 127.0f;
      sums[r * blocks + g] = sum(total);
    }
  return {rows, scales, sums};
}

template <int kBits, int kRows, int kWide>
void fast_product(const Rounded& x, const QuantizedWeight& w, const Layout& layout, int64_t panel, const float* bias,
                  float* y, int count) {
  constexpr int kVectors = kWide * kParts, kWord = per_word(kBits);
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  constexpr int kChains = kRows * kVectors <= 2 ? 2 : 1;
  const int64_t padded = layout.blocks * w.block, blocks = layout.blocks;
  const int words = w.block / kWord;
  const uint32_t* codes = w.codes + panel * layout.words * kPanel;
  Float result[kRows][kVectors] = {};
  for (int64_t g = 0; g < blocks; ++g) {
    Int total[kRows][kVectors][kChains] = {};
    for (int j = 0; j < words; ++j) {
      const int64_t word = g * words + j;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Word packed = load<Word>(codes + (v / kParts * layout.words + word) * kPanel + v % kParts * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kWord / 4; ++i) {
          const Word four = kBits == 8 ? packed : (packed >> (kBits * i)) & kMask;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int32_t activations;
            std::memcpy(&activations, x.rows + r * padded + word * kWord + 4 * i, 4);
            Int& sum = total[r][v][i % kChains];
            sum = dot4<kBits>(sum, four, splat(activations));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = ((panel + v / kParts) * blocks + g) * kPanel + v % kParts * kLanes;
      const Float scale = load(w.scales + at);
      const Float zero = zero_points(w, at) - static_cast<float>(dot_offset<kBits>());
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Int all = total[r][v][0];
        for (int c = 1; c < kChains; ++c) all += total[r][v][c];
        result[r][v] += (to_float(all) - zero * x.sums[r * blocks + g]) * (scale * x.scales[r * blocks + g]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      finish(result[r][v], bias ? bias + v * kLanes : nullptr, y + static_cast<int64_t>(r) * w.rows + v * kLanes,
             count - v * kLanes);
}

// --- all rows and panels --------------------------------------------------------------------------------------------

// Panels that one call of a product for few rows takes: as many sums as hide the latency and fit the registers.
constexpr int wide_for(int rows) { return kLanes == 16 ? (rows == 1 ? 4 : 2) : kLanes == 8 && rows == 1 ? 2 : 1; }

// Above this, codes come from memory and are taken panel by panel: one stream, which the prefetcher follows.
constexpr int64_t kNearBytes = 1 << 20;

template <class Prepared>
using Product = void (*)(const Prepared&, const QuantizedWeight&, const Layout&, int64_t, const float*, float*, int);

// Panels of `part`, kWide at a time while there are so many.
template <int kWide, class Prepared>
void over_panels(Product<Prepared> wide, Product<Prepared> narrow, const Prepared& x, const QuantizedWeight& w,
                 const Layout& layout, Range part, const float* bias, float* y) {
  const bool near = (part.end - part.begin) * layout.words * 4 <= kNearBytes;
  for (int64_t n = part.begin; n < part.end;) {
    const int64_t left = part.end - n;
    const bool all = near && left > (kWide - 1) * kPanel;
    (all ? wide : narrow)(x, w, layout, n / kPanel, bias ? bias + n : nullptr, y + n, static_cast<int>(left));
    n += all ? kWide * kPanel : kPanel;
  }
}

template <int kBits, int kRows>
void exact_rows(const float* x, const QuantizedWeight& w, const Layout& layout, const float* bias, float* y,
                Range part) {
  constexpr int kWide = wide_for(kRows);
  over_panels<kWide, Unscaled>(exact_product<kBits, kRows, kWide>, exact_product<kBits, kRows, 1>,
                               unscaled<kBits>(x, w, layout, kRows), w, layout, part, bias, y);
}

template <int kBits, int kRows>
void fast_rows(const float* x, const QuantizedWeight& w, const Layout& layout, const float* bias, float* y,
               Range part) {
  constexpr int kWide = wide_for(kRows);
  over_panels<kWide, Rounded>(fast_product<kBits, kRows, kWide>, fast_product<kBits, kRows, 1>,
                              rounded(x, w, layout, kRows), w, layout, part, bias, y);
}

struct Dequantized;

template <int kBits>
void exact_many(const float* x, const QuantizedWeight& w, const Layout& layout, const float* bias, float* y, int m,
                Range part) {
  float* floats = scratch<Dequantized, float>(kTilePanels * (kDepth + per_word(kBits)) * kPanel);
  constexpr int64_t kStride = kDepth * kPanel;
  blocked_product(x, m, part.begin, part.end, w.columns, bias, y, w.rows,
                  [&](int64_t panel, int wide, int k, int depth) {
                    for (int p = 0; p < wide; ++p)
                      dequantize<kBits>(w, layout, panel + p, k, depth, floats + p * kStride);
                    return Panels{floats, kStride, kPanel};
                  });
}

using Rows = void (*)(const float*, const QuantizedWeight&, const Layout&, const float*, float*, Range);

template <int kBits>
void quantized(const float* x, const QuantizedWeight& w, const float* bias, float* y, int m, Accuracy accuracy,
               Range part) {
  static constexpr Rows kExactRows[kFewRows] = {exact_rows<kBits, 1>, exact_rows<kBits, 2>, exact_rows<kBits, 3>,
                                                exact_rows<kBits, 4>};
  static constexpr Rows kFastRows[kFewRows] = {fast_rows<kBits, 1>, fast_rows<kBits, 2>, fast_rows<kBits, 3>,
                                               fast_rows<kBits, 4>};
  const Layout layout(w);
  const bool fast = accuracy == Accuracy::kFast;
  if (!fast && m > kFewRows) return exact_many<kBits>(x, w, layout, bias, y, m, part);
  for (int r = 0; r < m; r += kFewRows)
    (fast ? kFastRows : kExactRows)[(m - r < kFewRows ? m - r : kFewRows) - 1](
        x + static_cast<int64_t>(r) * w.columns, w, layout, bias, y + static_cast<int64_t>(r) * w.rows, part);
}

}  // namespace

void quantized_linear(const float* x, const QuantizedWeight& w, const float* bias, float* y, int m,
                      Accuracy accuracy, int task, int tasks) {
  const Range part = part_of(w.rows, task, tasks, kPanel);
  switch (w.bits) {
    case 2: return quantized<2>(x, w, bias, y, m, accuracy, part);
    case 4: return quantized<4>(x, w, bias, y, m, accuracy, part);
    default: return quantized<8>(x, w, bias, y, m, accuracy, part);
  }
}

void quantized_embedding(const int32_t* ids, const QuantizedWeight& w, float* y, int count, int task, int tasks) {
  const Layout layout(w);
  const int in_word = per_word(w.bits);
  const Range part = part_of(count, task, tasks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t panel = ids[i] / kPanel, lane = ids[i] % kPanel;
    for (int c = 0; c < w.columns; ++c) {
      const int64_t block = (panel * layout.blocks + c / w.block) * kPanel + lane;
      const uint32_t word = w.codes[(panel * layout.words + c / in_word) * kPanel + lane];
      const int code = static_cast<int>(word >> shift_of(w.bits, c % in_word)) & ((1 << w.bits) - 1);
      const int zero = w.zeros ? w.zeros[block] : 1 << (w.bits - 1);
      y[i * w.columns + c] = static_cast<float>(code - zero) * w.scales[block];
    }
  }
}

}  // namespace edge
