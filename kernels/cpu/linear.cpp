// Products with float weights, stored as float32 or half precision.
#include "gemm.h"
#include "scratch.h"
#include "tasks.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

// Rows of x from which on the register tile beats the vector product.
constexpr int kFewRows = 4;
EDGE_INLINE Float weight_at(const float* from) { return load(from); }
EDGE_INLINE Float weight_at(const uint16_t* from) { return from_halves(from); }

// kRows rows of x against one panel: the weights are read once, four sums for each hide the latency of the additions.
template <int kRows, class Weight>
void vector_product(const float* x, const Weight* w, const float* bias, float* y, int rows, int columns, int count) {
  constexpr int kChains = kRows == 1 ? 4 : 2;
  Float total[kRows][kParts][kChains] = {};
  int k = 0;
  for (; k + kChains <= columns; k += kChains)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kParts; ++v) {
        const Float right = weight_at(w + (k + c) * kPanel + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) total[r][v][c] += splat(x[r * columns + k + c]) * right;
      }
  for (; k < columns; ++k)
    for (int v = 0; v < kParts; ++v) {
      const Float right = weight_at(w + k * kPanel + v * kLanes);
      for (int r = 0; r < kRows; ++r) total[r][v][0] += splat(x[r * columns + k]) * right;
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kParts && v * kLanes < count; ++v) {
      Float result = total[r][v][0];
      for (int c = 1; c < kChains; ++c) result += total[r][v][c];
      const int there = std::min(kLanes, count - v * kLanes);
      if (bias) result += load_part(bias + v * kLanes, there);
      store_part(y + static_cast<int64_t>(r) * rows + v * kLanes, result, there);
    }
}

struct Converted;

Panels panels_of(const float* weight, int columns, int64_t panel, int, int k, int) {
  const int64_t stride = int64_t{columns} * kPanel;
  return {weight + panel * stride + int64_t{k} * kPanel, stride, kPanel};
}

Panels panels_of(const uint16_t* weight, int columns, int64_t panel, int wide, int k, int depth) {
  float* floats = scratch<Converted, float>(kTilePanels * kDepth * kPanel);
  for (int p = 0; p < wide; ++p) {
    const uint16_t* from = weight + ((panel + p) * columns + k) * kPanel;
    for (int i = 0; i < depth * kPanel; i += kLanes) store(floats + p * kDepth * kPanel + i, from_halves(from + i));
  }
  return {floats, kDepth * kPanel, kPanel};
}

template <class Weight>
void product_with(const float* x, const Weight* weight, const float* bias, float* y, int m, int rows, int columns,
                  int task, int tasks) {
  using Product = void (*)(const float*, const Weight*, const float*, float*, int, int, int);
  static constexpr Product kProducts[kFewRows] = {vector_product<1, Weight>, vector_product<2, Weight>,
                                                  vector_product<3, Weight>, vector_product<4, Weight>};
  const Range part = part_of(rows, task, tasks, kPanel);
  if (m > kFewRows) {
    blocked_product(x, m, part.begin, part.end, columns, bias, y, rows,
                    [&](int64_t panel, int wide, int k, int depth) {
                      return panels_of(weight, columns, panel, wide, k, depth);
                    });
  } else if (m > 0) {
    for (int64_t n = part.begin; n < part.end; n += kPanel)
      kProducts[m - 1](x, weight + n * columns, bias ? bias + n : nullptr, y + n, rows, columns,
                       static_cast<int>(std::min<int64_t>(kPanel, part.end - n)));
  }
}

}  // namespace

void linear(const float* x, const float* weight, const float* bias, float* y, int m, int rows, int columns, int task,
            int tasks) {
  product_with(x, weight, bias, y, m, rows, columns, task, tasks);
}

void linear_f16(const float* x, const uint16_t* weight, const float* bias, float* y, int m, int rows, int columns,
                int task, int tasks) {
  product_with(x, weight, bias, y, m, rows, columns, task, tasks);
}

}  // namespace edge
