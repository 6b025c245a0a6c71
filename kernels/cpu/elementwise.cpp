// Norms, activations and table look-ups: one pass over the data where the formula allows it.
#include <algorithm>
#include <cmath>

#include "tasks.h"
#include "vector_math.h"

namespace edge __attribute__((visibility("hidden"))) {
namespace {

float sum_of(const float* x, int64_t count) {
  Float total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) total[c] += load(x + i + c * kLanes);
  each_vector(count - i, [&](int64_t at, int there) { total[0] += load_up_to(x + i + at, there); });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Sum of (x - mean)^2; lanes past the end count for nothing.
float squares_of(const float* x, float mean, int64_t count) {
  Float total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) {
      const Float d = load(x + i + c * kLanes) - mean;
      total[c] += d * d;
    }
  for (; i < count; ++i) total[0][0] += (x[i] - mean) * (x[i] - mean);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

void normalise(const float* x, const float* weight, float eps, float* y, int columns) {
  const float factor = 1.0f / std::sqrt(squares_of(x, 0, columns) / static_cast<float>(columns) + eps);
  each_vector(columns, [&](int64_t i, int count) {
    store_up_to(y + i, load_up_to(x + i, count) * factor * load_up_to(weight + i, count), count);
  });
}

struct Moments {
  float mean, inverse_deviation;
};

Moments moments_of(const float* x, int64_t count, float eps) {
  const float mean = sum_of(x, count) / static_cast<float>(count);
  return {mean, 1.0f / std::sqrt(squares_of(x, mean, count) / static_cast<float>(count) + eps)};
}

// Rows that share a pass over the codes.
constexpr int kNearRows = 4;

// The nearest codes of kRows rows. Squared differences are summed as they are: |x|^2 - 2xe + |e|^2 would cancel.
template <int kRows>
void nearest(const float* x, const float* panels, int64_t* y, int codes, int channels) {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  Float least[kRows];
  Int which[kRows] = {};
  for (Float& value : least) value = splat(HUGE_VALF);
  for (int first = 0; first < codes; first += kLanes) {
    const float* from = panels + int64_t{first / kPanel} * channels * kPanel + first % kPanel;
    Float total[kRows] = {};
    for (int c = 0; c < channels; ++c) {
      const Float code = load(from + c * kPanel);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Float apart = x[r * channels + c] - code;
        total[r] += apart * apart;
      }
    }
    const Int at = lanes + first;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Int nearer = (total[r] < least[r]) & (at < codes);  // a panel is filled up with zeros
      least[r] = nearer ? total[r] : least[r];
      which[r] = nearer ? at : which[r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    int best = 0;
    for (int i = 1; i < kLanes; ++i) {
      const bool same = least[r][i] == least[r][best] && which[r][i] < which[r][best];
      if (least[r][i] < least[r][best] || same) best = i;
    }
    y[r] = which[r][best];
  }
}

}  // namespace

void nearest_code(const float* x, const float* panels, int64_t* y, int rows, int codes, int channels, int task,
                  int tasks) {
  const Range part = part_of(rows, task, tasks);
  int64_t r = part.begin;
  for (; r + kNearRows <= part.end; r += kNearRows)
    nearest<kNearRows>(x + r * channels, panels, y + r, codes, channels);
  for (; r < part.end; ++r) nearest<1>(x + r * channels, panels, y + r, codes, channels);
}

void rms_norm(const float* x, const float* weight, float eps, float* y, int rows, int columns, int task, int tasks) {
  const Range part = part_of(rows, task, tasks);
  for (int64_t r = part.begin; r < part.end; ++r) normalise(x + r * columns, weight, eps, y + r * columns, columns);
}

void add_rms_norm(const float* x, const float* residual, const float* weight, float eps, float* y, float* total,
                  int rows, int columns, int task, int tasks) {
  const Range part = part_of(rows, task, tasks);
  for (int64_t r = part.begin; r < part.end; ++r) {
    const int64_t at = r * columns;
    each_vector(columns, [&](int64_t i, int count) {
      store_up_to(total + at + i, load_up_to(x + at + i, count) + load_up_to(residual + at + i, count), count);
    });
    normalise(total + at, weight, eps, y + at, columns);
  }
}

void swiglu(const float* joined, float* y, int rows, int columns, int task, int tasks) {
  const Range part = part_of(rows, task, tasks);
  for (int64_t r = part.begin; r < part.end; ++r) {
    const float *gate = joined + 2 * r * columns, *up = gate + columns;
    each_vector(columns, [&](int64_t i, int count) {
      store_up_to(y + r * columns + i, silu(load_up_to(gate + i, count)) * load_up_to(up + i, count), count);
    });
  }
}

void activate(const float* x, float* y, int64_t count, Activation which, int task, int tasks) {
  const Range part = part_of(count, task, tasks, 64);
  with_activation(which, [&](auto constant) {
    each_vector(part.end - part.begin, [&](int64_t i, int there) {
      const int64_t at = part.begin + i;
      store_up_to(y + at, activation<decltype(constant)::value>(load_up_to(x + at, there)), there);
    });
  });
}

void group_norm(const float* x, const float* weight, const float* bias, float eps, float* y, int batch, int channels,
                int64_t positions, int groups, Activation which, int task, int tasks) {
  const int wide = channels / groups;
  const Range part = part_of(int64_t{batch} * groups, task, tasks);
  with_activation(which, [&](auto constant) {
    for (int64_t g = part.begin; g < part.end; ++g) {
      const Moments moments = moments_of(x + g * wide * positions, wide * positions, eps);
      for (int c = 0; c < wide; ++c) {
        const int64_t channel = g % groups * wide + c, at = (g * wide + c) * positions;
        const float scale = moments.inverse_deviation * weight[channel];
        each_vector(positions, [&](int64_t i, int there) {
          const Float value = (load_up_to(x + at + i, there) - moments.mean) * scale + bias[channel];
          store_up_to(y + at + i, activation<decltype(constant)::value>(value), there);
        });
      }
    }
  });
}

void group_norm_factors(const float* x, const float* weight, const float* bias, float eps, float* scale, float* shift,
                        int batch, int channels, int64_t positions, int groups, int task, int tasks) {
  const int wide = channels / groups;
  const Range part = part_of(int64_t{batch} * groups, task, tasks);
  for (int64_t g = part.begin; g < part.end; ++g) {
    const Moments moments = moments_of(x + g * wide * positions, wide * positions, eps);
    for (int c = 0; c < wide; ++c) {
      const int64_t channel = g % groups * wide + c;
      scale[g * wide + c] = moments.inverse_deviation * weight[channel];
      shift[g * wide + c] = bias[channel] - moments.mean * scale[g * wide + c];
    }
  }
}

void codebook_lookup(const int32_t* codes, const float* tables, float* y, int batch, int books, int64_t positions,
                     int size, int channels, int task, int tasks) {
  const Range part = part_of(batch * positions, task, tasks);
  for (int64_t at = part.begin; at < part.end; ++at) {
    const int64_t b = at / positions, p = at % positions;
    float* to = y + b * channels * positions + p;
    for (int book = 0; book < books; ++book) {
      const int64_t code = codes[(b * books + book) * positions + p];
      const float* row = tables + (book * int64_t{size} + code) * channels;
      for (int c = 0; c < channels; ++c) to[c * positions] = book == 0 ? row[c] : to[c * positions] + row[c];
    }
  }
}

}  // namespace edge
