// Convolution and transposed convolution, one and two dimensions, as a sum over taps of shifted rows.
//
// A tile of the input is copied, channel by channel, into a patch with its zero padding, so that all that follows is
// free of edges. In the patch, rows follow each other at a fixed pitch; the output has the same pitch, and the input
// of output position p under a tap is at p + (a constant of the tap). Positions between the rows are computed and
// thrown away. A stride splits the patch into phases (every s-th column, row), which makes it 1; a transposed
// convolution is one such sum for each phase of the output. What the caller wants done to the input (a norm's factors,
// an activation, doubling) happens as it is copied, what is wanted of the output as it is stored.
#include <algorithm>

#include "scratch.h"
#include "tasks.h"
#include "vector_math.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

// Register tile: vectors of positions x output channels, 24 of 32 or 12 of 16 registers.
constexpr int kVectors = 3;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kChannels = 4;
#else
constexpr int kChannels = 8;
#endif
constexpr int kStep = kVectors * kLanes;

// Floats of a patch: an eighth of a second-level cache, with the weights and the output of a panel beside it.
constexpr int64_t kPatchFloats = 24 * 1024;

// What a tap reads and multiplies with.
struct Tap {
  int64_t input;   // from the output's position in the patch
  int64_t weight;  // of one input channel
};

struct Patch {
  const float* data;
  int64_t plane;  // from channel to channel
};

template <int kRows, int kWide>
EDGE_INLINE void sum_tile(const Patch& patch, int channels, const Tap* taps, int count, const float* weight,
                          int64_t weight_plane, float* out, int64_t out_plane) {
  Float total[kRows][kWide] = {};
  for (int c = 0; c < channels; ++c) {
    const float* from = patch.data + c * patch.plane;
    const float* by = weight + c * weight_plane;
    for (int t = 0; t < count; ++t) {
      Float input[kWide];
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) input[v] = load(from + taps[t].input + v * kLanes);
      const float* factors = by + taps[t].weight;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) total[r][v] += input[v] * splat(factors[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) store(out + r * out_plane + v * kLanes, total[r][v]);
}

// Positions [0, positions) of kRows output channels; what is stored is rounded up to whole vectors.
template <int kRows>
void sum_rows(Patch patch, int channels, const Tap* taps, int count, const float* weight, int64_t weight_plane,
              float* out, int64_t out_plane, int64_t positions) {
  int64_t p = 0;
  for (; p + kStep - kLanes < positions; p += kStep) {
    sum_tile<kRows, kVectors>({patch.data + p, patch.plane}, channels, taps, count, weight, weight_plane, out + p,
                              out_plane);
  }
  for (; p < positions; p += kLanes)
    sum_tile<kRows, 1>({patch.data + p, patch.plane}, channels, taps, count, weight, weight_plane, out + p,
                       out_plane);
}

void sum_panel(const Patch& patch, int channels, const Tap* taps, int count, const float* weight,
               int64_t weight_plane, float* out, int64_t out_plane, int64_t positions, int rows) {
  const auto some = [&](int from, auto kernel) {
    kernel(patch, channels, taps, count, weight + from, weight_plane, out + from * out_plane, out_plane, positions);
  };
  int r = 0;
  for (; r + kChannels <= rows; r += kChannels) some(r, sum_rows<kChannels>);
  for (; r + 4 <= rows; r += 4) some(r, sum_rows<4>);
  for (; r + 2 <= rows; r += 2) some(r, sum_rows<2>);
  for (; r < rows; ++r) some(r, sum_rows<1>);
}

// --- in -------------------------------------------------------------------------------------------------------------

// Columns [begin, begin + count) of a row of `width` with the change applied, zeros beyond both ends.
void read_row(const float* row, int width, int64_t begin, int64_t count, float scale, float shift, Activation before,
              bool changed, float* to) {
  const int64_t left = std::clamp<int64_t>(-begin, 0, count);
  const int64_t right = std::clamp<int64_t>(width - begin, left, count);
  std::fill(to, to + left, 0.0f);
  const float* from = row + begin + left;
  if (changed)
    with_activation(before, [&](auto constant) {
      for (int64_t i = left; i < right; i += kLanes, from += kLanes) {
        const int there = static_cast<int>(std::min<int64_t>(kLanes, right - i));
        const Float value = there == kLanes ? load(from) : load_part(from, there);
        const Float result = activation<decltype(constant)::value>(value * scale + shift);
        if (there == kLanes)
          store(to + i, result);
        else
          store_part(to + i, result, there);
      }
    });
  else
    std::copy(from, from + (right - left), to + left);
  std::fill(to + right, to + count, 0.0f);
}

// Columns of the input that a tile reads, and how they lie in the patch.
struct Window {
  int64_t top, left;       // first row and column of the input (after doubling), may be negative
  int64_t rows, columns;   // of a phase
  int stride_y, stride_x;  // phases
  int64_t pitch() const { return columns; }
  int64_t phase() const { return rows * pitch(); }
  int64_t plane() const { return phase() * stride_y * stride_x; }
};

struct PatchFloats;
struct RowFloats;
struct SumFloats;
struct MergedFloats;
struct TapList;

// Where row y of a doubled axis comes from; rounds down for the padding above as well.
int64_t halved(int64_t at, bool doubled) { return doubled ? at >> 1 : at; }

Patch read_patch(const float* x, const ConvShape& shape, const ConvFusion& fusion, int batch, int first_channel,
                 int channels, const Window& window) {
  // Vectors of the last positions reach past the last channel's plane.
  float* patch = scratch<PatchFloats, float>(static_cast<size_t>(channels * window.plane()) + 2 * kStep);
  const bool doubled = shape.upsample == 2, doubled_y = doubled && shape.in_height > 1;
  const int64_t span = window.columns * window.stride_x;
  const int64_t first = halved(window.left, doubled), read = halved(window.left + span - 1, doubled) - first + 1;
  const bool direct = !doubled && window.stride_x == 1;
  float* row = scratch<RowFloats, float>(static_cast<size_t>(read));
  const bool changed = fusion.scale || fusion.shift || fusion.before != Activation::kNone;
  const int64_t height = int64_t{shape.in_height} * (doubled_y ? 2 : 1);
  for (int c = 0; c < channels; ++c) {
    const int channel = first_channel + c;
    const int64_t factor = fusion.per_batch ? int64_t{batch} * shape.in_channels + channel : channel;
    const float scale = fusion.scale ? fusion.scale[factor] : 1, shift = fusion.shift ? fusion.shift[factor] : 0;
    const float* plane = x + (int64_t{batch} * shape.in_channels + channel) * shape.in_height * shape.in_width;
    for (int64_t i = 0; i < window.rows * window.stride_y; ++i) {
      const int64_t y = window.top + i;
      const int64_t phase = i % window.stride_y * window.stride_x;
      float* to = patch + c * window.plane() + phase * window.phase() + i / window.stride_y * window.pitch();
      if (y < 0 || y >= height) {
        for (int s = 0; s < window.stride_x; ++s)
          std::fill_n(to + s * window.phase(), window.columns, 0.0f);
        continue;
      }
      const float* from = plane + halved(y, doubled_y) * shape.in_width;
      read_row(from, shape.in_width, first, read, scale, shift, fusion.before, changed, direct ? to : row);
      if (direct) continue;
      for (int s = 0; s < window.stride_x; ++s)
        for (int64_t k = 0; k < window.columns; ++k)
          to[s * window.phase() + k] = row[halved(window.left + s + k * window.stride_x, doubled) - first];
    }
  }
  return {patch, window.plane()};
}

// --- out ------------------------------------------------------------------------------------------------------------

void write_row(const float* sums, const float* bias, const float* residual, Activation after, float* y,
               int64_t count) {
  const float start = bias ? *bias : 0;
  with_activation(after, [&](auto constant) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int there = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      Float value = load(sums + i) + start;
      if (there == kLanes) {
        if (residual) value += load(residual + i);
        store(y + i, activation<decltype(constant)::value>(value));
      } else {
        if (residual) value += load_part(residual + i, there);
        store_part(y + i, activation<decltype(constant)::value>(value), there);
      }
    }
  });
}

// Rows [0, ways) of `from`, `stride` apart, element by element in turn.
void merge(const float* from, int64_t stride, int ways, int64_t count, float* to) {
  if (ways == 4) {
    for (int64_t i = 0; i < count; ++i)
      for (int w = 0; w < 4; ++w) to[4 * i + w] = from[w * stride + i];
  } else {
    for (int w = 0; w < ways; ++w)
      for (int64_t i = 0; i < count; ++i) to[ways * i + w] = from[w * stride + i];
  }
}

// --- tiles ----------------------------------------------------------------------------------------------------------

// The output in units of its phases: one for a convolution, stride x stride for a transposed one.
struct Grid {
  int64_t rows, columns;            // of phase 0, the largest
  int64_t tile_rows, tile_columns;  // of a unit of work
  int64_t down() const { return ceil_div(rows, tile_rows); }
  int64_t across() const { return ceil_div(columns, tile_columns); }
};

// Tiles whose patch stays in the cache, and enough of them for all tasks: runs of a long row, or whole short rows.
Grid grid_of(int64_t rows, int64_t columns, int64_t floats_per_position, int64_t units, int tasks) {
  const int64_t positions = std::max<int64_t>(kStep, kPatchFloats / floats_per_position);
  const int64_t shares = ceil_div(tasks, units);
  if (rows == 1 || columns > positions) {
    const int64_t tiles = std::max(ceil_div(columns, positions), rows > 1 ? 1 : shares);
    return {rows, columns, 1, ceil_div(ceil_div(columns, tiles), kStep) * kStep};
  }
  return {rows, columns, std::clamp<int64_t>(positions / columns, 1, ceil_div(rows, shares)), columns};
}

// What a kernel covers along one axis: taps of one phase of the output with what each reads, in steps of the phase.
struct Axis {
  int kernel, stride, dilation, pad;
  bool transposed;

  int phases() const { return transposed ? stride : 1; }
  // Whether tap t adds to phase r, and the input it reads for position 0, counted in input elements.
  bool reads(int phase, int t) const { return !transposed || (phase + pad - t * dilation) % stride == 0; }
  int64_t at(int phase, int t) const {
    return transposed ? (phase + pad - t * dilation) / stride : int64_t{t} * dilation - pad;
  }
  int64_t first() const { return bound([](int64_t a, int64_t b) { return std::min(a, b); }); }
  int64_t last() const { return bound([](int64_t a, int64_t b) { return std::max(a, b); }); }
  // Input elements from one output position to the next.
  int step() const { return transposed ? 1 : stride; }

 private:
  template <class Pick>
  int64_t bound(Pick pick) const {
    int64_t best = 0;
    bool any = false;
    for (int phase = 0; phase < phases(); ++phase)
      for (int t = 0; t < kernel; ++t)
        if (reads(phase, t)) {
          best = any ? pick(best, at(phase, t)) : at(phase, t);
          any = true;
        }
    return best;
  }
};

// Taps of output phase (ry, rx) in a patch that begins at the axes' first elements.
int taps_of(const Axis& down, const Axis& across, int ry, int rx, const Window& window, Tap* taps) {
  int count = 0;
  for (int ky = 0; ky < down.kernel; ++ky)
    for (int kx = 0; kx < across.kernel; ++kx) {
      if (!down.reads(ry, ky) || !across.reads(rx, kx)) continue;
      const int64_t y = down.at(ry, ky) - down.first(), x = across.at(rx, kx) - across.first();
      const int64_t phase = y % down.step() * across.step() + x % across.step();
      taps[count++] = {phase * window.phase() + y / down.step() * window.pitch() + x / across.step(),
                       (int64_t{ky} * across.kernel + kx) * kChannelPanel};
    }
  return count;
}

struct Job {
  const float *x, *weight;
  const ConvShape& shape;
  const ConvFusion& fusion;
  float* y;
  Axis down, across;
};

// Output rows of phase ry from the sums of a panel, [phases across, 8, positions].
void write_panel(const Job& job, const float* sums, int64_t plane, int64_t pitch, int batch, int channel, int rows,
                 int ry, Range qy, Range qx) {
  const ConvShape& shape = job.shape;
  const int ways = job.across.phases();
  const int64_t left = qx.begin * ways, count = std::min<int64_t>(shape.out_width, qx.end * ways) - left;
  float* merged = scratch<MergedFloats, float>(static_cast<size_t>((qx.end - qx.begin) * ways + kLanes));
  for (int r = 0; r < rows; ++r)
    for (int64_t q = qy.begin; q < qy.end; ++q) {
      const int64_t row = q * job.down.phases() + ry;
      if (row >= shape.out_height) continue;
      const float* from = sums + r * plane + (q - qy.begin) * pitch;
      if (ways > 1) merge(from, plane * kChannelPanel, ways, qx.end - qx.begin, merged);
      const int64_t at =
          ((int64_t{batch} * shape.out_channels + channel + r) * shape.out_height + row) * shape.out_width + left;
      write_row(ways > 1 ? merged : from, job.fusion.bias ? job.fusion.bias + channel + r : nullptr,
                job.fusion.residual ? job.fusion.residual + at : nullptr, job.fusion.after, job.y + at, count);
    }
}

void run_tile(const Job& job, int batch, int group, Range qy, Range qx) {
  const ConvShape& shape = job.shape;
  const Axis &down = job.down, &across = job.across;
  const int in = shape.in_channels / shape.groups, out = shape.out_channels / shape.groups;
  const int64_t rows = qy.end - qy.begin, columns = qx.end - qx.begin;
  const Window window{qy.begin * down.step() + down.first(),
                      qx.begin * across.step() + across.first(),
                      rows + (down.last() - down.first()) / down.step(),
                      columns + (across.last() - across.first()) / across.step(),
                      down.step(),
                      across.step()};
  const Patch patch = read_patch(job.x, shape, job.fusion, batch, group * in, in, window);
  const int all_taps = down.kernel * across.kernel;
  const int64_t positions = (rows - 1) * window.pitch() + columns, plane = ceil_div(positions, kStep) * kStep + kStep;
  Tap* taps = scratch<TapList, Tap>(static_cast<size_t>(all_taps));
  float* sums = scratch<SumFloats, float>(static_cast<size_t>(plane * kChannelPanel * across.phases()));
  const int64_t weight_plane = int64_t{all_taps} * kChannelPanel, panel = in * weight_plane;
  const float* weight = job.weight + group * ceil_div(out, kChannelPanel) * panel;
  for (int channel = 0; channel < out; channel += kChannelPanel, weight += panel) {
    const int now = std::min(kChannelPanel, out - channel);
    for (int ry = 0; ry < down.phases(); ++ry) {
      for (int rx = 0; rx < across.phases(); ++rx)
        sum_panel(patch, in, taps, taps_of(down, across, ry, rx, window, taps), weight, weight_plane,
                  sums + rx * kChannelPanel * plane, plane, positions, now);
      write_panel(job, sums, plane, window.pitch(), batch, group * out + channel, now, ry, qy, qx);
    }
  }
}

void run(const Job& job, int task, int tasks) {
  const ConvShape& shape = job.shape;
  const int64_t units = int64_t{shape.batch} * shape.groups;
  const int64_t per_position = int64_t{shape.in_channels / shape.groups} * job.down.step() * job.across.step();
  const Grid grid = grid_of(ceil_div(shape.out_height, job.down.phases()),
                            ceil_div(shape.out_width, job.across.phases()), per_position, units, tasks);
  const Range part = part_of(units * grid.down() * grid.across(), task, tasks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t across = i % grid.across(), down = i / grid.across() % grid.down();
    const int64_t unit = i / grid.across() / grid.down();
    const auto span = [](int64_t at, int64_t size, int64_t all) {
      return Range{at * size, std::min(all, (at + 1) * size)};
    };
    run_tile(job, static_cast<int>(unit / shape.groups), static_cast<int>(unit % shape.groups),
             span(down, grid.tile_rows, grid.rows), span(across, grid.tile_columns, grid.columns));
  }
}

Job job_of(const float* x, const float* weight, const ConvShape& shape, const ConvFusion& fusion, float* y,
           bool transposed) {
  return {x,
          weight,
          shape,
          fusion,
          y,
          {shape.kernel_height, shape.stride_height, shape.dilation_height, shape.pad_top, transposed},
          {shape.kernel_width, shape.stride_width, shape.dilation_width, shape.pad_left, transposed}};
}

}  // namespace

void conv2d(const float* x, const float* weight, const ConvShape& shape, const ConvFusion& fusion, float* y, int task,
            int tasks) {
  run(job_of(x, weight, shape, fusion, y, false), task, tasks);
}

void conv_transpose2d(const float* x, const float* weight, const ConvShape& shape, const ConvFusion& fusion, float* y,
                      int task, int tasks) {
  run(job_of(x, weight, shape, fusion, y, true), task, tasks);
}

}  // namespace edge
