// The register tile of the float matrix product.
#include "gemm.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

template <int kRows, int kWide>
EDGE_INLINE void tile(const float* x, int64_t x_stride, const Panels& w, int64_t depth, const Output& out,
                      int columns) {
  constexpr int kVectors = kWide * kParts;
  Float total[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Float right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      right[v] = load(w.data + v / kParts * w.panel_stride + k * w.row_stride + v % kParts * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Float left = splat(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = out.data + r * out.stride + v * kLanes;
      const float* start = out.add ? to : out.bias ? out.bias + v * kLanes : nullptr;
      const int there = columns - v * kLanes;
      if (there >= kLanes) {
        store(to, start ? total[r][v] + load(start) : total[r][v]);
      } else if (there > 0) {
        store_part(to, start ? total[r][v] + load_part(start, there) : total[r][v], there);
      }
    }
  }
}

template <int kRows, int kWide>
void tile_of(const float* x, int64_t x_stride, const Panels& w, int64_t depth, const Output& out, int columns) {
  tile<kRows, kWide>(x, x_stride, w, depth, out, columns);
}

// All rows of x against kWide panels, in tiles as even as can be.
template <int kWide>
void product_of(const float* x, int64_t x_stride, int m, const Panels& w, int64_t depth, Output out,
                       int columns) {
  using Tile = void (*)(const float*, int64_t, const Panels&, int64_t, const Output&, int);
  static constexpr Tile kTiles[] = {
      tile_of<1, kWide>, tile_of<2, kWide>, tile_of<3, kWide>, tile_of<4, kWide>,
      tile_of<5, kWide>, tile_of<6, kWide>,
#if defined(__AVX512F__)
      tile_of<7, kWide>, tile_of<8, kWide>, tile_of<9, kWide>, tile_of<10, kWide>,
      tile_of<11, kWide>, tile_of<12, kWide>,
#endif
  };
  static_assert(sizeof kTiles / sizeof kTiles[0] == kTileRows);
  for (int tiles = (m + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int rows = (m + tiles - 1) / tiles;
    kTiles[rows - 1](x, x_stride, w, depth, out, columns);
    x += rows * x_stride;
    out.data += rows * out.stride;
    m -= rows;
  }
}

}  // namespace

void product(const float* x, int64_t x_stride, int m, Panels w, int64_t depth, Output out, int columns) {
  while (columns > 0) {
    const int wide = columns > kPanel ? kTilePanels : 1;
    if (wide == kTilePanels)
      product_of<kTilePanels>(x, x_stride, m, w, depth, out, columns);
    else
      product_of<1>(x, x_stride, m, w, depth, out, columns);
    w.data += wide * w.panel_stride;
    out.data += wide * kPanel;
    if (out.bias) out.bias += wide * kPanel;
    columns -= wide * kPanel;
  }
}

}  // namespace edge
