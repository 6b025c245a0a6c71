// The float matrix product all others come down to: y [m, columns] (+)= x [m, k] . panels of 16 columns.
#pragma once

#include <algorithm>

#include "edge_kernels.h"
#include "simd.h"

namespace edge __attribute__((visibility("hidden"))) {

// Vectors that make a panel.
constexpr int kParts = kPanel / kLanes;

// Register tile: rows x panels. It fills the register file: 24 of 32 (AVX-512, NEON) or 12 of 16 accumulators.
constexpr int kTilePanels = kLanes == 16 ? 2 : 1;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// Columns of the right-hand side: panel p begins at data + p * panel_stride, its row k at + k * row_stride.
struct Panels {
  const float* data;
  int64_t panel_stride, row_stride;
};

// Where a tile goes. Add: to what is there. Otherwise `bias` (or 0) is the start of the sum.
struct Output {
  float* data;
  int64_t stride;
  const float* bias;
  bool add;
};

// y [m, columns] with ceil(columns / 16) panels.
void product(const float* x, int64_t x_stride, int m, Panels w, int64_t depth, Output out, int columns);

// Depth of a block that stays in the first-level cache while all rows of x pass over it.
constexpr int kDepth = 256;

// Columns [begin, end) of y [m, ...] = x . W + bias, where source(panel, wide, k, depth) gives `wide` panels from
// `panel` on, rows [k, k + depth).
template <class Source>
void blocked_product(const float* x, int m, int64_t begin, int64_t end, int depth, const float* bias, float* y,
                     int64_t y_stride, const Source& source) {
  for (int64_t n = begin; n < end; n += kTilePanels * kPanel) {
    const int count = static_cast<int>(std::min<int64_t>(kTilePanels * kPanel, end - n));
    const int wide = (count + kPanel - 1) / kPanel;
    for (int k = 0; k < depth; k += kDepth) {
      const int now = std::min(kDepth, depth - k);
      const Output out{y + n, y_stride, bias ? bias + n : nullptr, k > 0};
      product(x + k, depth, m, source(n / kPanel, wide, k, now), now, out, count);
    }
  }
}

}  // namespace edge
