// Sizes that the kernels and their plans agree on.
#pragma once

#ifdef __CUDACC__
#define EDGE_BOTH __host__ __device__
#else
#define EDGE_BOTH
#endif

namespace edge {

constexpr int ATTENTION_THREADS = 128, ATTENTION_WARPS = 4;
constexpr int DECODE_HEADS = 8;    // of one key head, that one pass over the cache serves
constexpr int PREFILL_ROWS = 64;   // (token, head) pairs of a block, 16 a warp
constexpr int MERGE_THREADS = 256;

/// Head dims are rounded up to the widths that kernels exist for; 0: none.
EDGE_BOTH constexpr int padded_width(int head_dim) {
    return head_dim < 8 || head_dim % 8 ? 0 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : head_dim <= 256 ? 256 : 0;
}

/// Slots that a warp of a decode step has in registers at a time: 2048 numbers of keys, and as many of values.
EDGE_BOTH constexpr int decode_slots(int width) { return 2048 / width; }
EDGE_BOTH constexpr int query_pitch(int width) { return width + 8; }   // halves, of a head's q
EDGE_BOTH constexpr int decode_pitch(int width) { return width + 4; }  // floats, of a head's sums
/// One buffer for q, k and v in halves, and later for each warp's sums with m and l.
EDGE_BOTH constexpr int decode_shared(int width) {
    return ATTENTION_WARPS * DECODE_HEADS * (decode_pitch(width) + 2) * 4;
}

/// Keys, and then values, that a block of the prefill has in shared memory at a time.
EDGE_BOTH constexpr int prefill_slots(int width) { return width == 256 ? 16 : 64; }
/// In halves; loads of 16 bytes of eight rows then touch each bank once.
EDGE_BOTH constexpr int prefill_pitch(int width) { return width + 8; }
EDGE_BOTH constexpr int prefill_shared(int width) {
    return (PREFILL_ROWS + prefill_slots(width)) * prefill_pitch(width) * 2 + prefill_slots(width) * 4;
}

}  // namespace edge
