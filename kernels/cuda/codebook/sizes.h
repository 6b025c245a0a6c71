// Sizes that the kernel and its plan agree on.
#pragma once

namespace edge {

constexpr int CODEBOOK_THREADS = 256;
constexpr int CODEBOOK_POSITIONS = 64, CODEBOOK_CHANNELS = 64;  // of a block's tile

}  // namespace edge
