// EdgeAttention over a float16 or an int8 cache, and EdgeAttentionMerge.
//
// Entry points (cache f16 or i8; d: head dims up to 64, 128 or 256, multiples of 8):
//   edge_attention_<cache>_d<d>_decode   one new token: row p of partial is split p of the cache
//   edge_attention_<cache>_d<d>_prefill  several new tokens: row s of partial is token s
//   edge_attention_<cache>_d<d>_any      one of the two by the number of tokens: for plugins whose kernel is chosen
//                                        before that is known
//   edge_attention_merge
// Arguments: qkv, past_key, past_value, (key_scales, value_scales,) last, cos, sin, partial, present_key,
// present_value, (present_key_scales, present_value_scales,) tokens, heads, kv_heads, head_dim, capacity, window,
// splits, scale, softcap; the merge's: partial, out, tokens, heads, head_dim, rows of partial.
// All pointers are multiples of 16; an int8 cache has an even capacity. present is the memory of past.
#pragma once

#include "../common/select.h"
#include "decode.cuh"
#include "merge.cuh"
#include "prefill.cuh"

namespace edge {

template <class Element, int Width>
__device__ __forceinline__ void run_decode(const Attention<Element>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    decode<Element, Width>(op, shared);
}
template <class Element, int Width>
__device__ __forceinline__ void run_prefill(const Attention<Element>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    prefill<Element, Width>(op, shared);
}
template <class Element, int Width>
__device__ __forceinline__ void run_any(const Attention<Element>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    if (op.tokens == 1) {
        decode<Element, Width>(op, shared);
    } else {
        prefill<Element, Width>(op, shared);
    }
}

}  // namespace edge

// --- entry points ---------------------------------------------------------------------------------------------------
// A block's threads, and blocks an SM: a decode step wants twelve warps' loads under way.
#define EDGE_ATTENTION_BOUNDS_decode(width) edge::ATTENTION_THREADS, (width) <= 128 ? 3 : 2
#define EDGE_ATTENTION_BOUNDS_prefill(width) edge::ATTENTION_THREADS, 2
#define EDGE_ATTENTION_BOUNDS_any(width) edge::ATTENTION_THREADS, 2
#define EDGE_ATTENTION_F16(width, kind)                                                                               \
    EDGE_KERNEL(EDGE_ATTENTION_BOUNDS_##kind(width))                                                                  \
    void edge_attention_f16_d##width##_##kind(                                                                        \
        const __half* qkv, const __half* past_key, const __half* past_value, const int* last, const float* cos,       \
        const float* sin, float* partial, __half* present_key, __half* present_value, int tokens, int heads,          \
        int kv_heads, int head_dim, int capacity, int window, int splits, float scale, float softcap) {               \
        edge::run_##kind<__half, width>(edge::Attention<__half>{                                                      \
            qkv, past_key, past_value, nullptr, nullptr, last, cos, sin, partial, present_key, present_value,         \
            nullptr, nullptr, tokens, heads, kv_heads, head_dim, capacity, window, splits, scale, softcap});          \
    }                                                                                                                 \
    EDGE_ENTRY(edge_attention_f16_d##width##_##kind);

#define EDGE_ATTENTION_I8(width, kind)                                                                                \
    EDGE_KERNEL(EDGE_ATTENTION_BOUNDS_##kind(width))                                                                  \
    void edge_attention_i8_d##width##_##kind(                                                                         \
        const __half* qkv, const signed char* past_key, const signed char* past_value, const __half* key_scales,      \
        const __half* value_scales, const int* last, const float* cos, const float* sin, float* partial,              \
        signed char* present_key, signed char* present_value, __half* present_key_scales,                             \
        __half* present_value_scales, int tokens, int heads, int kv_heads, int head_dim, int capacity, int window,    \
        int splits, float scale, float softcap) {                                                                     \
        edge::run_##kind<signed char, width>(edge::Attention<signed char>{                                            \
            qkv, past_key, past_value, key_scales, value_scales, last, cos, sin, partial, present_key, present_value, \
            present_key_scales, present_value_scales, tokens, heads, kv_heads, head_dim, capacity, window, splits,    \
            scale, softcap});                                                                                         \
    }                                                                                                                 \
    EDGE_ENTRY(edge_attention_i8_d##width##_##kind);

#define EDGE_ATTENTION(width)                                                                                         \
    EDGE_ATTENTION_F16(width, decode)                                                                                 \
    EDGE_ATTENTION_F16(width, prefill)                                                                                \
    EDGE_IF(EDGE_any, EDGE_ATTENTION_F16(width, any))                                                                 \
    EDGE_IF(EDGE_i8, EDGE_ATTENTION_I8(width, decode))                                                                \
    EDGE_IF(EDGE_i8, EDGE_ATTENTION_I8(width, prefill))                                                               \
    EDGE_IF(EDGE_i8, EDGE_IF(EDGE_any, EDGE_ATTENTION_I8(width, any)))
EDGE_IF(EDGE_d64, EDGE_ATTENTION(64))
EDGE_IF(EDGE_d128, EDGE_ATTENTION(128))
EDGE_IF(EDGE_d256, EDGE_ATTENTION(256))

EDGE_KERNEL(edge::MERGE_THREADS)
void edge_attention_merge(const float* partial, __half* out, int tokens, int heads, int head_dim, int rows) {
    edge::merge(partial, out, tokens, heads, head_dim, rows);
}
EDGE_ENTRY(edge_attention_merge);
