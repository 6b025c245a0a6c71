// Convolution and transposed convolution, one and two dimensions, as a sum over taps of shifted rows.
//
// A tile of the input is copied, channel by channel, into a patch with its zero padding, so that all that follows is
// free of edges. In the patch, rows follow each other at a fixed pitch; the output has the same pitch, and the input
// of output position p under a tap is at p + (a constant of the tap). Positions between the rows are computed and
// thrown away. A stride splits the patch into phases (every s-th column, row), which makes it 1; a transposed
// convolution is one such sum for each phase of the output. What the caller wants done to the input (a norm's factors,
// an activation, doubling) happens as it is copied, what is wanted of the output as it is stored.
#include <algorithm>
#include <type_traits>

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
  const auto step = [&](auto wide) {
    sum_tile<kRows, decltype(wide)::value>({patch.data + p, patch.plane}, channels, taps, count, weight, weight_plane,
                                           out + p, out_plane);
    p += decltype(wide)::value * kLanes;
  };
  while (p + kStep - kLanes < positions) step(std::integral_constant<int, kVectors>{});
  if (p + kLanes < positions) step(std::integral_constant<int, 2>{});
  if (p < positions) step(std::integral_constant<int, 1>{});
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

// What becomes of a channel's values on the way in.
struct Change {
  float scale, shift;
};

// to[i] = activation(from[i] * scale + shift).
template <Activation kBefore>
void change_values(const float* from, int64_t count, const Change& change, float* to) {
  each_vector(count, [&](int64_t i, int there) {
    const Float value = load_up_to(from + i, there) * change.scale + change.shift;
    store_up_to(to + i, activation<kBefore>(value), there);
  });
}

// to[i] = from[2 * i]; reads 2 * count - 1 values.
void every_second(const float* from, int64_t count, float* to) {
  each_vector(count, [&](int64_t i, int there) {
    const int there_twice = 2 * there - 1;
    const Float low = load_up_to(from + 2 * i, std::min(kLanes, there_twice));
    const Float high = there_twice > kLanes ? load_part(from + 2 * i + kLanes, there_twice - kLanes) : Float{};
    store_up_to(to + i, evens(low, high), there);
  });
}

// to[2 * i] = to[2 * i + 1] = from[i], for `count` values of `from`.
void each_twice(const float* from, int64_t count, float* to) {
  each_vector(count, [&](int64_t i, int there) {
    const Float value = load_up_to(from + i, there);
    store_up_to(to + 2 * i, low_twice(value), std::min(kLanes, 2 * there));
    if (2 * there > kLanes) store_up_to(to + 2 * i + kLanes, high_twice(value), 2 * there - kLanes);
  });
}

// to[i] = from[stride * i].
EDGE_INLINE void every(int stride, const float* from, int64_t count, float* to) {
  if (stride == 1)
    each_vector(count, [&](int64_t i, int there) { store_up_to(to + i, load_up_to(from + i, there), there); });
  else if (stride == 2)
    every_second(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

// Columns of the input that a tile reads, and how they lie in the patch.
struct Window {
  int64_t top, left;       // first row and column of the input (after doubling), may be negative
  int64_t rows, columns;   // of a phase
  int stride_y, stride_x;  // phases
  int64_t phase() const { return rows * columns; }
  int64_t plane() const { return phase() * stride_y * stride_x; }
};

struct PatchFloats;
struct ChangedFloats;
struct TwiceFloats;
struct PhaseReach;
struct SumFloats;
struct MergedFloats;
struct TapList;
struct TapCounts;

// Where row y of a doubled axis comes from; rounds down for the padding above as well.
int64_t halved(int64_t at, bool doubled) { return doubled ? at >> 1 : at; }

template <Activation kBefore>
Patch read_patch(const float* x, const ConvShape& shape, const ConvFusion& fusion, int batch, int first_channel,
                 int channels, const Window& window) {
  const bool doubled = shape.upsample == 2, doubled_y = doubled && shape.in_height > 1;
  const int64_t height = int64_t{shape.in_height} * (doubled_y ? 2 : 1);
  const int64_t width = int64_t{shape.in_width} * (doubled ? 2 : 1), span = window.columns * window.stride_x;
  // What the window covers of the plane itself, before doubling.
  const int64_t top = std::clamp<int64_t>(window.top, 0, height);
  const int64_t bottom = std::clamp<int64_t>(window.top + window.rows * window.stride_y, top, height);
  const int64_t left = std::clamp<int64_t>(window.left, 0, width), right = std::clamp(window.left + span, left, width);
  const Range rows{halved(top, doubled_y), halved(bottom + (doubled_y ? 1 : 0), doubled_y)};
  const Range columns{halved(left, doubled), halved(right + (doubled ? 1 : 0), doubled)};
  const int64_t read = columns.end - columns.begin;
  const bool changes = fusion.scale || fusion.shift || kBefore != Activation::kNone;
  // A single tap reads whole vectors of positions where they lie.
  const bool alone = shape.kernel_height * shape.kernel_width * window.stride_y * window.stride_x == 1;
  if (alone && !changes && !doubled && read == shape.in_width && window.columns == read &&
      rows.end - rows.begin == window.rows && window.phase() % kLanes == 0) {
    const int64_t plane = int64_t{shape.in_height} * shape.in_width;
    return {x + (int64_t{batch} * shape.in_channels + first_channel) * plane + rows.begin * read, plane};
  }
  Range* reach = scratch<PhaseReach, Range>(static_cast<size_t>(window.stride_x));
  for (int s = 0; s < window.stride_x; ++s)
    reach[s] = {ceil_div(left - window.left - s, window.stride_x), ceil_div(right - window.left - s, window.stride_x)};
  // Vectors of the last positions reach past the last channel's plane.
  float* patch = scratch<PatchFloats, float>(static_cast<size_t>(channels * window.plane()) + 2 * kStep);
  float* changed = scratch<ChangedFloats, float>(static_cast<size_t>((rows.end - rows.begin) * read + kLanes));
  float* twice = scratch<TwiceFloats, float>(static_cast<size_t>(2 * read));
  if (bottom - top < window.rows * window.stride_y || right - left < span)
    std::fill_n(patch, channels * window.plane(), 0.0f);
  for (int c = 0; c < channels; ++c) {
    const int channel = first_channel + c;
    const int64_t factor = fusion.per_batch ? int64_t{batch} * shape.in_channels + channel : channel;
    const Change change{fusion.scale ? fusion.scale[factor] : 1, fusion.shift ? fusion.shift[factor] : 0};
    int64_t pitch = shape.in_width;
    const float* source =
        x + ((int64_t{batch} * shape.in_channels + channel) * shape.in_height + rows.begin) * pitch + columns.begin;
    if (changes) {
      const bool whole = read == pitch;
      for (int64_t r = rows.begin; r < (whole ? rows.begin + 1 : rows.end); ++r)
        change_values<kBefore>(source + (r - rows.begin) * pitch, whole ? (rows.end - rows.begin) * read : read,
                               change, changed + (r - rows.begin) * read);
      source = changed;
      pitch = read;
    }
    for (int py = 0; py < window.stride_y; ++py) {
      float* to = patch + c * window.plane() + py * window.stride_x * window.phase();
      for (int64_t i = 0, y = window.top + py; i < window.rows; ++i, y += window.stride_y, to += window.columns) {
        if (y < top || y >= bottom) continue;
        const float* row = source + (halved(y, doubled_y) - rows.begin) * pitch;
        if (doubled) {
          each_twice(row, read, twice);
          row = twice + (left & 1);
        }
        for (int s = 0; s < window.stride_x; ++s) {
          every(window.stride_x, row + window.left + s + reach[s].begin * window.stride_x - left,
                reach[s].end - reach[s].begin, to + s * window.phase() + reach[s].begin);
        }
      }
    }
  }
  return {patch, window.plane()};
}

// --- out ------------------------------------------------------------------------------------------------------------

template <Activation kAfter>
void write_row(const float* sums, float bias, const float* residual, float* y, int64_t count) {
  each_vector(count, [&](int64_t i, int there) {
    Float value = load(sums + i) + bias;
    if (residual) value += load_up_to(residual + i, there);
    store_up_to(y + i, activation<kAfter>(value), there);
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

// What a kernel covers along one axis: taps of each phase of the output with what they read.
struct Axis {
  int kernel, stride, dilation, pad;
  bool transposed;
  int64_t first = 0, last = 0;  // input elements of all taps for output position 0

  Axis(int kernel, int stride, int dilation, int pad, bool transposed)
      : kernel(kernel), stride(stride), dilation(dilation), pad(pad), transposed(transposed) {
    bool any = false;
    for (int phase = 0; phase < phases(); ++phase)
      for (int t = 0; t < kernel; ++t)
        if (reads(phase, t)) {
          first = any ? std::min(first, at(phase, t)) : at(phase, t);
          last = any ? std::max(last, at(phase, t)) : at(phase, t);
          any = true;
        }
  }

  int phases() const { return transposed ? stride : 1; }
  // Input elements from one output position of a phase to the next.
  int step() const { return transposed ? 1 : stride; }
  // Whether tap t adds to a phase, and which input element it reads for position 0.
  bool reads(int phase, int t) const { return !transposed || (phase + pad - t * dilation) % stride == 0; }
  int64_t at(int phase, int t) const {
    return transposed ? (phase + pad - t * dilation) / stride : int64_t{t} * dilation - pad;
  }
};

struct Job {
  const float *x, *weight;
  const ConvShape& shape;
  const ConvFusion& fusion;
  float* y;
  Axis down, across;
};

// Taps of output phase (ry, rx) in a patch that begins at the axes' first elements; returns how many.
int taps_of(const Job& job, int ry, int rx, const Window& window, Tap* taps) {
  const Axis &down = job.down, &across = job.across;
  int count = 0;
  for (int ky = 0; ky < down.kernel; ++ky)
    for (int kx = 0; kx < across.kernel; ++kx) {
      if (!down.reads(ry, ky) || !across.reads(rx, kx)) continue;
      const int64_t y = down.at(ry, ky) - down.first, x = across.at(rx, kx) - across.first;
      const int64_t phase = y % down.step() * across.step() + x % across.step();
      taps[count++] = {phase * window.phase() + y / down.step() * window.columns + x / across.step(),
                       (int64_t{ky} * across.kernel + kx) * kChannelPanel};
    }
  return count;
}

// Sums of a panel of output channels, [phases across, 8, plane], rows `pitch` apart.
struct Sums {
  const float* data;
  int64_t plane, pitch;
};

// Rows of output phase ry from a panel's sums.
template <Activation kAfter>
void write_panel(const Job& job, const Sums& sums, int batch, int channel, int rows, int ry, Range qy, Range qx) {
  const ConvShape& shape = job.shape;
  const int ways = job.across.phases();
  const int64_t left = qx.begin * ways, count = std::min<int64_t>(shape.out_width, qx.end * ways) - left;
  float* merged = scratch<MergedFloats, float>(static_cast<size_t>((qx.end - qx.begin) * ways + kLanes));
  for (int r = 0; r < rows; ++r)
    for (int64_t q = qy.begin; q < qy.end; ++q) {
      const int64_t row = q * job.down.phases() + ry;
      if (row >= shape.out_height) continue;
      const float* from = sums.data + r * sums.plane + (q - qy.begin) * sums.pitch;
      if (ways > 1) merge(from, sums.plane * kChannelPanel, ways, qx.end - qx.begin, merged);
      const int64_t at =
          ((int64_t{batch} * shape.out_channels + channel + r) * shape.out_height + row) * shape.out_width + left;
      write_row<kAfter>(ways > 1 ? merged : from, job.fusion.bias ? job.fusion.bias[channel + r] : 0,
                        job.fusion.residual ? job.fusion.residual + at : nullptr, job.y + at, count);
    }
}

void run_tile(const Job& job, int batch, int group, Range qy, Range qx) {
  const ConvShape& shape = job.shape;
  const Axis &down = job.down, &across = job.across;
  const int in = shape.in_channels / shape.groups, out = shape.out_channels / shape.groups;
  const int64_t rows = qy.end - qy.begin, columns = qx.end - qx.begin;
  const Window window{qy.begin * down.step() + down.first,
                      qx.begin * across.step() + across.first,
                      rows + (down.last - down.first) / down.step(),
                      columns + (across.last - across.first) / across.step(),
                      down.step(),
                      across.step()};
  Patch patch{};
  with_activation(job.fusion.before, [&](auto before) {
    patch = read_patch<decltype(before)::value>(job.x, shape, job.fusion, batch, group * in, in, window);
  });
  const int all_taps = down.kernel * across.kernel, phases = down.phases() * across.phases();
  Tap* taps = scratch<TapList, Tap>(static_cast<size_t>(all_taps * phases));
  int* counts = scratch<TapCounts, int>(static_cast<size_t>(phases));
  for (int phase = 0; phase < phases; ++phase)
    counts[phase] =
        taps_of(job, phase / across.phases(), phase % across.phases(), window, taps + phase * all_taps);
  const int64_t positions = (rows - 1) * window.columns + columns;
  const int64_t plane = ceil_div(positions, kStep) * kStep + kStep;
  float* sums = scratch<SumFloats, float>(static_cast<size_t>(plane * kChannelPanel * across.phases()));
  const int64_t weight_plane = int64_t{all_taps} * kChannelPanel, panel = in * weight_plane;
  const float* weight = job.weight + group * ceil_div(out, kChannelPanel) * panel;
  for (int channel = 0; channel < out; channel += kChannelPanel, weight += panel) {
    const int now = std::min(kChannelPanel, out - channel);
    for (int ry = 0; ry < down.phases(); ++ry) {
      for (int rx = 0; rx < across.phases(); ++rx) {
        const int phase = ry * across.phases() + rx;
        sum_panel(patch, in, taps + phase * all_taps, counts[phase], weight, weight_plane,
                  sums + rx * kChannelPanel * plane, plane, positions, now);
      }
      with_activation(job.fusion.after, [&](auto after) {
        write_panel<decltype(after)::value>(job, {sums, plane, window.columns}, batch, group * out + channel, now, ry,
                                            qy, qx);
      });
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
