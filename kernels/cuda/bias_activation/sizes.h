// Sizes that the kernels and their plan agree on.
#pragma once

namespace edge {

constexpr int ACTIVATION_THREADS = 256;
constexpr int ACTIVATION_VECTORS = 4;  // loads that a thread has under way

}  // namespace edge
