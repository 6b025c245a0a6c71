// Static partition of work.
#pragma once

#include <cstdint>

namespace edge __attribute__((visibility("hidden"))) {

struct Range {
  int64_t begin, end;
};

// The part of [0, count) that belongs to `task`: as even as can be, bounds at multiples of `unit`.
inline Range part_of(int64_t count, int task, int tasks, int64_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  const auto bound = [&](int64_t t) {
    const int64_t at = units * t / tasks * unit;
    return at < count ? at : count;
  };
  return {bound(task), bound(task + 1)};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace edge
