// Sizes that the head's kernels and their plans agree on.
#pragma once

#include "../linear/sizes.h"

namespace edge {

constexpr int HEAD_TILE = 256, HEAD_WARPS = 8;  // rows of the vocabulary a block, and its warps
constexpr int HEAD_TOP = 64;                    // the largest k
constexpr int MERGE_WARPS = 8;

/// What is used one after the other: the warps' partial sums in two buffers, the keys of a tile.
EDGE_BOTH constexpr int head_scratch(int rows) {
    return rows < 2 ? HEAD_TILE * 8 : 2 * HEAD_WARPS * rows * TILE * 4;
}

/// The scratch, logits, x.
constexpr int head_shared(int rows, int columns, int bits, int block) {
    return head_scratch(rows) + rows * HEAD_TILE * 4 + staged_bytes(rows, columns, bits, block);
}

}  // namespace edge
