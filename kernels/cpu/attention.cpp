// Grouped-query attention over a cache of fixed capacity.
//
// The query heads of a group share keys and values, so a unit of work is one key-value head and a run of queries.
// Many queries: keys are turned into panels and both products are those of gemm.h. A single step: dot products along
// the rows of the cache as they lie, which are read once for all heads of the group.
#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "scratch.h"
#include "tasks.h"
#include "vector_math.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

// Queries of a unit of work: keys are turned once for each.
constexpr int kQueries = 64;
// Rows whose scores are held at a time; a multiple of the register tile.
constexpr int kScoreRows = 4 * kTileRows;

// RoPE, half-split: the angles of one position, [width / 2] each; null leaves the row as it is.
void rotate(const float* x, const float* cos, const float* sin, float scale, float* y, int width) {
  const int half = width / 2;
  if (!cos) {
    for (int d = 0; d < width; ++d) y[d] = x[d] * scale;
    return;
  }
  for (int d = 0; d < half; ++d) {
    const float first = x[d], second = x[d + half];
    y[d] = (first * cos[d] - second * sin[d]) * scale;
    y[d + half] = (second * cos[d] + first * sin[d]) * scale;
  }
}

struct Angles {
  const float *cos, *sin;
};

Angles angles_at(const AttentionInput& input, int position, int width) {
  if (!input.cos) return {nullptr, nullptr};
  const int64_t at = int64_t{position} * (width / 2);
  return {input.cos + at, input.sin + at};
}

// Slots [begin, end) that the query at `position` sees.
Range visible(const AttentionShape& shape, int position) {
  return {shape.window > 0 ? std::max(0, position + 1 - shape.window) : 0, position + 1};
}

// Scores of slots [0, count), of which the first `hidden` are not seen, to weights; returns 1 / their sum.
float softmax(float* scores, int64_t hidden, int64_t seen, int64_t count, float softcap) {
  std::fill(scores, scores + hidden, -INFINITY);
  std::fill(scores + seen, scores + count, -INFINITY);
  if (softcap > 0)
    for (int64_t i = hidden; i < seen; i += kLanes) {
      const int there = static_cast<int>(std::min<int64_t>(kLanes, seen - i));
      store_part(scores + i, tanh(load_part(scores + i, there) / softcap) * softcap, there);
    }
  Float top = splat(-INFINITY);
  for (int64_t i = 0; i < count; i += kLanes) top = max(load(scores + i), top);
  float largest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, top[lane]);
  Float total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float score = load(scores + i);
    const Float weight = score == splat(-INFINITY) ? Float{} : exp(score - largest);
    total += weight;
    store(scores + i, weight);
  }
  return 1.0f / sum(total);
}

struct QueryRows;
struct KeyPanels;
struct ValueRows;
struct Scores;
struct Results;

// One key-value head and its queries [first, first + steps).
struct Unit {
  const float *keys, *values;  // [capacity, width]
  int batch, kv_head, first, steps, position;  // of the first query
};

// Rotated and scaled queries of a unit, [heads of the group * steps, width], head by head.
const float* rotated_queries(const AttentionInput& input, const AttentionShape& shape, const Unit& unit) {
  const int group = shape.heads / shape.kv_heads;
  float* rows = scratch<QueryRows, float>(static_cast<size_t>(group) * unit.steps * shape.width);
  for (int s = 0; s < unit.steps; ++s) {
    const Angles angles = angles_at(input, unit.position + s, shape.width);
    const float* from = input.query + (int64_t{unit.batch} * shape.steps + unit.first + s) * input.query_stride +
                        int64_t{unit.kv_head} * group * shape.width;
    for (int h = 0; h < group; ++h)
      rotate(from + h * shape.width, angles.cos, angles.sin, shape.scale,
             rows + (int64_t{h} * unit.steps + s) * shape.width, shape.width);
  }
  return rows;
}

float* output_row(float* y, const AttentionShape& shape, const Unit& unit, int row) {
  const int group = shape.heads / shape.kv_heads, head = unit.kv_head * group + row / unit.steps;
  const int64_t step = int64_t{unit.batch} * shape.steps + unit.first + row % unit.steps;
  return y + (step * shape.heads + head) * shape.width;
}

// Slots [begin, end) of the keys as panels of 16 slots, [panels, width, 16]; lanes past the end are 0.
Panels key_panels(const AttentionShape& shape, const Unit& unit, Range slots) {
  const int width = shape.width;
  const int64_t panels = ceil_div(slots.end - slots.begin, kPanel);
  float* to = scratch<KeyPanels, float>(static_cast<size_t>(panels) * kPanel * width);
  for (int64_t p = 0; p < panels; ++p)
    for (int lane = 0; lane < kPanel; ++lane) {
      const int64_t slot = slots.begin + p * kPanel + lane;
      const float* from = unit.keys + slot * width;
      for (int d = 0; d < width; ++d) to[(p * width + d) * kPanel + lane] = slot < slots.end ? from[d] : 0;
    }
  return {to, int64_t{width} * kPanel, kPanel};
}

// Values of the slots as panels of 16 dimensions: the cache itself where its rows are whole panels.
Panels value_panels(const AttentionShape& shape, const Unit& unit, Range slots) {
  const int width = shape.width;
  if (width % kPanel == 0) return {unit.values + slots.begin * width, kPanel, width};
  const int64_t padded = ceil_div(width, kPanel) * kPanel;
  float* to = scratch<ValueRows, float>(static_cast<size_t>((slots.end - slots.begin) * padded));
  for (int64_t i = 0; i < slots.end - slots.begin; ++i) {
    std::copy_n(unit.values + (slots.begin + i) * width, width, to + i * padded);
    std::fill(to + i * padded + width, to + (i + 1) * padded, 0.0f);
  }
  return {to, kPanel, padded};
}

void attend_many(const AttentionInput& input, const AttentionShape& shape, const Unit& unit, float* y) {
  const int width = shape.width, rows = shape.heads / shape.kv_heads * unit.steps;
  const Range slots{visible(shape, unit.position).begin, unit.position + unit.steps};
  const int64_t count = ceil_div(slots.end - slots.begin, kPanel) * kPanel;
  const float* queries = rotated_queries(input, shape, unit);
  const Panels keys = key_panels(shape, unit, slots), values = value_panels(shape, unit, slots);
  float* scores = scratch<Scores, float>(static_cast<size_t>(count) * kScoreRows);
  float* results = scratch<Results, float>(static_cast<size_t>(kScoreRows) * width);
  float inverse[kScoreRows];
  for (int first = 0; first < rows; first += kScoreRows) {
    const int now = std::min(kScoreRows, rows - first);
    product(queries + int64_t{first} * width, width, now, keys, width, {scores, count, nullptr, false},
            static_cast<int>(count));
    for (int r = 0; r < now; ++r) {
      const Range seen = visible(shape, unit.position + (first + r) % unit.steps);
      inverse[r] =
          softmax(scores + r * count, seen.begin - slots.begin, seen.end - slots.begin, count, shape.softcap);
    }
    product(scores, count, now, values, slots.end - slots.begin, {results, width, nullptr, false}, width);
    for (int r = 0; r < now; ++r) {
      float* to = output_row(y, shape, unit, first + r);
      for (int d = 0; d < width; ++d) to[d] = results[int64_t{r} * width + d] * inverse[r];
    }
  }
}

// kHeads heads against the same keys and values, whose rows are read once.
template <int kHeads>
void attend_step(const AttentionShape& shape, const Unit& unit, const float* queries, int head, float* y) {
  const int width = shape.width, whole = width - width % kLanes;
  const Range slots = visible(shape, unit.position);
  const int64_t seen = slots.end - slots.begin, count = ceil_div(seen, kPanel) * kPanel;
  float* scores = scratch<Scores, float>(static_cast<size_t>(count) * kHeads);
  const float* keys = unit.keys + slots.begin * width;
  const float* values = unit.values + slots.begin * width;
  for (int64_t i = 0; i < seen; ++i) {
    Float total[kHeads] = {};
    for (int d = 0; d < whole; d += kLanes) {
      const Float key = load(keys + i * width + d);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) total[h] += key * load(queries + (head + h) * width + d);
    }
    for (int h = 0; h < kHeads; ++h) {
      float score = sum(total[h]);
      for (int d = whole; d < width; ++d) score += keys[i * width + d] * queries[(head + h) * width + d];
      scores[h * count + i] = score;
    }
  }
  float inverse[kHeads];
  for (int h = 0; h < kHeads; ++h) inverse[h] = softmax(scores + h * count, 0, seen, count, shape.softcap);
  for (int d = 0; d < width; d += kLanes) {
    const int there = std::min(kLanes, width - d);
    Float total[kHeads][2] = {};
    const auto add = [&](int64_t i, int chain) {
      const Float value = there == kLanes ? load(values + i * width + d) : load_part(values + i * width + d, there);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) total[h][chain] += value * scores[h * count + i];
    };
    int64_t i = 0;
    for (; i + 2 <= seen; i += 2) {
      add(i, 0);
      add(i + 1, 1);
    }
    if (i < seen) add(i, 0);
    for (int h = 0; h < kHeads; ++h)
      store_part(output_row(y, shape, unit, head + h) + d, (total[h][0] + total[h][1]) * inverse[h], there);
  }
}

void attend_one(const AttentionInput& input, const AttentionShape& shape, const Unit& unit, float* y) {
  using Step = void (*)(const AttentionShape&, const Unit&, const float*, int, float*);
  static constexpr Step kSteps[] = {attend_step<1>, attend_step<2>, attend_step<3>, attend_step<4>};
  const float* queries = rotated_queries(input, shape, unit);
  const int group = shape.heads / shape.kv_heads;
  for (int head = 0; head < group;) {
    const int now = std::min(4, group - head);
    kSteps[now - 1](shape, unit, queries, head, y);
    head += now;
  }
}

}  // namespace

void kv_append(const AttentionInput& input, const AttentionShape& shape, const int32_t* last, float* keys,
               float* values, int task, int tasks) {
  const int width = shape.width;
  const Range part = part_of(int64_t{shape.batch} * shape.kv_heads * shape.steps, task, tasks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t step = i % shape.steps, head = i / shape.steps % shape.kv_heads;
    const int64_t batch = i / shape.steps / shape.kv_heads, row = batch * shape.steps + step;
    const int position = last[batch] - (shape.steps - 1) + static_cast<int>(step);
    const int64_t to = ((batch * shape.kv_heads + head) * shape.capacity + position) * width;
    const Angles angles = angles_at(input, position, width);
    rotate(input.key + row * input.key_stride + head * width, angles.cos, angles.sin, 1, keys + to, width);
    std::copy_n(input.value + row * input.value_stride + head * width, width, values + to);
  }
}

void kv_attend(const AttentionInput& input, const AttentionShape& shape, const int32_t* last, const float* keys,
               const float* values, float* y, int task, int tasks) {
  const int64_t runs = ceil_div(shape.steps, kQueries);
  const Range part = part_of(int64_t{shape.batch} * shape.kv_heads * runs, task, tasks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t head = i / runs % shape.kv_heads, batch = i / runs / shape.kv_heads;
    const int64_t cache = (batch * shape.kv_heads + head) * shape.capacity * shape.width;
    const int first = static_cast<int>(i % runs) * kQueries;
    const Unit unit{keys + cache, values + cache, static_cast<int>(batch), static_cast<int>(head), first,
                    std::min(kQueries, shape.steps - first), last[batch] - (shape.steps - 1) + first};
    (unit.steps == 1 ? attend_one : attend_many)(input, shape, unit, y);
  }
}

}  // namespace edge
