// What an attention kernel reads and writes: rows of the cache in float16 or int8, and the new rows out of qkv.
#pragma once

#include "../common/device.cuh"
#include "sizes.h"

namespace edge {

/// One EdgeAttention. Rows of the cache are [B, KV, C, D]; scales, [B, KV, C], are null for a float16 cache.
template <class Element>
struct Attention {
    const __half* qkv;
    const Element *past_key, *past_value;
    const __half *key_scales, *value_scales;
    const int* last;
    const float *cos, *sin;
    float* partial;
    Element *present_key, *present_value;
    __half *present_key_scales, *present_value_scales;
    int tokens, heads, kv_heads, head_dim, capacity, window, splits;
    float scale, softcap;

    __device__ __forceinline__ int group() const { return heads / kv_heads; }
    /// The slot of the newest token. One outside of the cache (no valid call has it) must not touch memory outside.
    __device__ __forceinline__ int newest(int b) const { return min(max(last[b], 0), capacity - 1); }
    __device__ __forceinline__ long long row(int b, int kv, int slot) const {
        return ((long long)(b)*kv_heads + kv) * capacity + slot;
    }
    __device__ __forceinline__ const __half* token(int b, int s) const {
        return qkv + ((long long)(b)*tokens + s) * (heads + 2 * kv_heads) * head_dim;
    }
    __device__ __forceinline__ float* out(int b, int head, int p) const {
        const int rows = max(tokens, splits);
        return partial + (((long long)(b)*heads + head) * rows + p) * (head_dim + 2);
    }
    __device__ __forceinline__ float capped(float score) const { return softcap * tanhf(score / softcap); }
};

// --- eight elements of a row: a chunk -------------------------------------------------------------------------------
/// 16 or 8 bytes that are read once, or zero if not `wanted`: predicated, since a branch for each load would part the
/// lanes, and others' loads would have to wait.
__device__ __forceinline__ uint4 load_once_if(bool wanted, const __half* p) {
#ifdef __CUDA_ARCH__
    uint4 v;
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"(int(wanted)));
    return v;
#else
    return wanted ? load_once(p) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ uint2 load_once_if(bool wanted, const signed char* p) {
#ifdef __CUDA_ARCH__
    uint2 v;
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@wanted ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(p), "r"(int(wanted)));
    return v;
#else
    return wanted ? edge_cpu::load<uint2>(p) : make_uint2(0, 0);
#endif
}

template <class Element>
struct Chunk;

template <>
struct Chunk<__half> {
    uint4 v;
    __device__ __forceinline__ void clear() { v = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const __half* p) { v = load16(p); }
    /// Elements 2 j and 2 j + 1 as halves.
    __device__ __forceinline__ unsigned word(int j) const { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }
};

/// int8 as exact halves, without the scale: 0x6400 | (x + 128) is the half 1152 + x.
template <>
struct Chunk<signed char> {
    uint2 v;
    __device__ __forceinline__ void clear() { v = make_uint2(0, 0); }
    __device__ __forceinline__ void load(const signed char* p) { v = *reinterpret_cast<const uint2*>(p); }
    __device__ __forceinline__ unsigned word(int j) const {
        const unsigned biased = (j < 2 ? v.x : v.y) ^ 0x80808080u;
        const unsigned pair = __byte_perm(biased, 0x64646464u, j % 2 ? 0x4342 : 0x4140);
        return as_bits(__hsub2(as_half2(pair), __float2half2_rn(1152.0f)));
    }
};

/// The low, or the high, halves of two words.
__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

// --- new rows: Width / 8 lanes work on one --------------------------------------------------------------------------
/// Of a row of D halves: elements 4 i .. 4 i + 3 and D / 2 + 4 i .., which RoPE turns together. Lanes from D / 8 on
/// hold nothing of the row; they keep the padding up to Width zero.
struct Quads {
    float low[4], high[4];
};

__device__ __forceinline__ void load4(float (&to)[4], const __half* p) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    const float2 a = __half22float2(as_half2(bits.x)), b = __half22float2(as_half2(bits.y));
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

__device__ __forceinline__ Quads load_quads(const __half* row, int head_dim, int i) {
    Quads x = {};
    if (8 * i >= head_dim) return x;
    load4(x.low, row + 4 * i);
    load4(x.high, row + head_dim / 2 + 4 * i);
    return x;
}

/// Turned by the tables' rows and rounded to float16.
__device__ __forceinline__ Quads rotated(Quads x, const float* cos, const float* sin, int head_dim, int i) {
    if (8 * i >= head_dim) return x;
    const float4 c = *reinterpret_cast<const float4*>(cos + 4 * i), s = *reinterpret_cast<const float4*>(sin + 4 * i);
    const float cs[4] = {c.x, c.y, c.z, c.w}, sn[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float low = x.low[e], high = x.high[e];
        x.low[e] = __half2float(__float2half_rn(low * cs[e] - high * sn[e]));
        x.high[e] = __half2float(__float2half_rn(high * cs[e] + low * sn[e]));
    }
    return x;
}

__device__ __forceinline__ void store4(__half* p, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(p) =
        make_uint2(as_bits(__floats2half2_rn(x[0], x[1])), as_bits(__floats2half2_rn(x[2], x[3])));
}

__device__ __forceinline__ void store4(signed char* p, const float (&x)[4]) {
    using C = signed char;
    *reinterpret_cast<char4*>(p) = make_char4(C(x[0]), C(x[1]), C(x[2]), C(x[3]));
}

/// A row as the cache keeps it, in shared memory (padded with zeros) or in the cache itself.
template <bool Padded, class To>
__device__ __forceinline__ void store_quads(To* row, const Quads& x, int head_dim, int i) {
    if (8 * i < head_dim) {
        store4(row + 4 * i, x.low);
        store4(row + head_dim / 2 + 4 * i, x.high);
    } else if constexpr (Padded) {
        store4(row + 8 * i, x.low);
        store4(row + 8 * i + 4, x.high);
    }
}

/// x becomes what the cache holds: halves, or codes of int8 whose float16 scale is returned (the largest magnitude of
/// the row / 127). All lanes of the warp call it; Width / 8 neighbours share a row.
template <int Width>
__device__ __forceinline__ float quantised(Quads&, const __half*) {
    return 1.0f;
}
template <int Width>
__device__ __forceinline__ float quantised(Quads& x, const signed char*) {
    float largest = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = fmaxf(largest, fmaxf(fabsf(x.low[e]), fabsf(x.high[e])));
#pragma unroll
    for (int step = Width / 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
    const float scale = __half2float(__float2half_rn(largest / 127.0f));
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // a scale that was rounded down would give 128
        x.low[e] = fminf(fmaxf(rintf(x.low[e] * inverse), -127.0f), 127.0f);
        x.high[e] = fminf(fmaxf(rintf(x.high[e] * inverse), -127.0f), 127.0f);
    }
    return scale;
}

/// q of (token s, head), or the new key and value row of kv, as the cache keeps it.
template <class Element>
__device__ __forceinline__ Quads query_quads(const Attention<Element>& op, int b, int s, int slot, int head, int i) {
    const long long turn = (long long)(slot) * (op.head_dim / 2);
    const Quads x = load_quads(op.token(b, s) + head * op.head_dim, op.head_dim, i);
    return rotated(x, op.cos + turn, op.sin + turn, op.head_dim, i);
}
template <class Element>
__device__ __forceinline__ Quads value_quads(const Attention<Element>& op, int b, int s, int kv, int i) {
    return load_quads(op.token(b, s) + (op.heads + op.kv_heads + kv) * op.head_dim, op.head_dim, i);
}

/// Writes a new row, key and value, into the cache.
template <int Width, class Element>
__device__ __forceinline__ void keep(const Attention<Element>& op, long long row, const Quads& key, const Quads& value,
                                     float key_scale, float value_scale, int i) {
    store_quads<false>(op.present_key + row * op.head_dim, key, op.head_dim, i);
    store_quads<false>(op.present_value + row * op.head_dim, value, op.head_dim, i);
    if (i == 0 && op.present_key_scales) {
        op.present_key_scales[row] = __float2half_rn(key_scale);
        op.present_value_scales[row] = __float2half_rn(value_scale);
    }
}

}  // namespace edge
