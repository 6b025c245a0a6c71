// Sizes that the kernels and their plan agree on.
#pragma once

namespace edge {

constexpr int NORM_HELD = 4;  // vectors of 8 that a thread keeps in registers between the statistics and their use
constexpr int NORM_THREADS = 1024;  // a block's limit
constexpr int NORM_PART_THREADS = 256, NORM_PARTS = 32;  // where several blocks share a group: at most so many

}  // namespace edge
