// One new token: all heads of a key head look at the cache together, which is read once, at the speed of memory.
//
// Blocks are (split of the cache, key head and eight of its heads, row of the batch). A warp goes over the split's
// slots in steps, with a step's keys and values in registers: while it works on the keys the values are on their way,
// and while it works on the values the next keys are. The tensor cores take both products straight from these
// registers, for they do not mind in which order the summed dimension comes, if both factors have the same order:
//
//   scores  d (heads x 8 slots) = q (16 x 16, rows 8 to 15 zero) K^T: lane (g, t) = (lane / 4, lane % 4) loads 16-byte
//           chunks t, t + 4, ... of slot g, and the same chunks of q's head g; it gets head g at slots 2 t and 2 t + 1.
//   sums    d (16 dims x heads) = V^T (16 x 16) p: what the lane holds of p is what this operand wants from it. Of V it
//           loads chunks g, g + 8, ... of slots 2 t and 2 t + 1, whose halves are paired by byte permutations.
//
// p is given as two halves, its rounding and the remainder, so that the sums are as good as float32's.
#pragma once

#include "cache.cuh"

namespace edge {

template <class Element>
struct CacheScale {  // values of an int8 cache are lifted, lest p * scale lose bits below float16's smallest number
    static constexpr bool INT8 = sizeof(Element) == 1;
    static constexpr float LIFT = INT8 ? 64.0f : 1.0f;
};

template <class Element, int Width>
struct DecodeWarp {
    static constexpr bool INT8 = CacheScale<Element>::INT8;
    static constexpr float LIFT = CacheScale<Element>::LIFT;
    static constexpr int SLOTS = decode_slots(Width), TILES = SLOTS / 8;
    static constexpr int K_CHUNKS = Width / 32, V_CHUNKS = Width / 64;

    const Attention<Element>& op;
    const int g = int(lane()) / 4, t = int(lane()) % 4;
    long long base;    // the first row of the cache
    int oldest, last;  // slots from oldest up to, not including, last are visible

    Chunk<Element> keys[TILES][K_CHUNKS], values[TILES][2][V_CHUNKS];
    float2 key_scales[TILES], value_scales[TILES];
    const __half* query = nullptr;  // head g's row in shared memory
    float acc[4 * V_CHUNKS][4] = {};  // [64 c + 8 g + 2 j, + 1] of heads 2 t, 2 t + 1: acc[4 c + j][2 dim + head]
    float m = -infinity(), l = 0;     // of head g; l is this lane's part

    __device__ __forceinline__ DecodeWarp(const Attention<Element>& op, long long base, int oldest, int last)
        : op(op), base(base), oldest(oldest), last(last) {}

    __device__ __forceinline__ bool visible(int slot) const { return slot >= oldest && slot < last; }

    __device__ __forceinline__ float2 load_scales(const __half* scales, int slot) const {
        const bool first = visible(slot), second = visible(slot + 1);
        if (!first && !second) return {0, 0};
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(scales + base + slot));
        return {first ? pair.x : 0.0f, second ? pair.y : 0.0f};
    }

    /// What is not visible is read as zero: it may hold anything.
    __device__ __forceinline__ void load_keys(int first) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const int slot = first + 8 * n + g;
            const Element* const row = op.past_key + (base + slot) * op.head_dim;
#pragma unroll
            for (int c = 0; c < K_CHUNKS; ++c) {
                const int element = 8 * (t + 4 * c);
                keys[n][c].v = load_once_if(visible(slot) && element < op.head_dim, row + element);
            }
            if constexpr (INT8) key_scales[n] = load_scales(op.key_scales, first + 8 * n + 2 * t);
        }
    }
    __device__ __forceinline__ void load_values(int first) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int slot = first + 8 * n + 2 * t + r;
                const Element* const row = op.past_value + (base + slot) * op.head_dim;
#pragma unroll
                for (int c = 0; c < V_CHUNKS; ++c) {
                    const int element = 8 * (g + 8 * c);
                    values[n][r][c].v = load_once_if(visible(slot) && element < op.head_dim, row + element);
                }
            }
            if constexpr (INT8) value_scales[n] = load_scales(op.value_scales, first + 8 * n + 2 * t);
        }
    }

    /// The state after the new token alone, whose rows are in shared memory as the cache keeps them.
    __device__ __forceinline__ void start(const __half* key, const __half* value, float key_scale, float value_scale) {
        float dot = 0;
#pragma unroll
        for (int c = 0; c < K_CHUNKS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 x = __half22float2(*reinterpret_cast<const __half2*>(query + 8 * (t + 4 * c) + 2 * j));
                const float2 y = __half22float2(*reinterpret_cast<const __half2*>(key + 8 * (t + 4 * c) + 2 * j));
                dot += x.x * y.x + x.y * y.y;
            }
        dot += __shfl_xor_sync(ALL_LANES, dot, 1);
        dot += __shfl_xor_sync(ALL_LANES, dot, 2);
        m = op.scale * dot * key_scale;
        if (op.softcap > 0) m = op.capped(m);
        l = t == 0 ? 1.0f : 0.0f;
#pragma unroll
        for (int c = 0; c < V_CHUNKS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 x = __half22float2(*reinterpret_cast<const __half2*>(value + 64 * c + 8 * g + 2 * j));
                acc[4 * c + j][0] = acc[4 * c + j][1] = x.x * (value_scale * LIFT);
                acc[4 * c + j][2] = acc[4 * c + j][3] = x.y * (value_scale * LIFT);
            }
    }

    /// Works on the step in the registers, from slot `first` on, and starts the loads of the step from `next` on.
    __device__ __forceinline__ void step(int first, int next) {
        float p[TILES][2];
        float largest = -infinity();
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float d[4] = {};
#pragma unroll
            for (int c = 0; c < K_CHUNKS; ++c) {
                const uint4 x = load16(query + 8 * (t + 4 * c));
                const unsigned left[4] = {x.x, 0, x.y, 0}, right[4] = {x.z, 0, x.w, 0};
                mma(d, left, keys[n][c].word(0), keys[n][c].word(1));
                mma(d, right, keys[n][c].word(2), keys[n][c].word(3));
            }
            if constexpr (INT8) d[0] *= key_scales[n].x, d[1] *= key_scales[n].y;
            p[n][0] = op.scale * d[0], p[n][1] = op.scale * d[1];
        }
        load_keys(next);
        if (op.softcap > 0) {
#pragma unroll
            for (int n = 0; n < TILES; ++n) p[n][0] = op.capped(p[n][0]), p[n][1] = op.capped(p[n][1]);
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (!visible(first + 8 * n + 2 * t + e)) p[n][e] = -infinity();
                largest = fmaxf(largest, p[n][e]);
            }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        if (__any_sync(ALL_LANES, largest > m)) rescale(fmaxf(m, largest));
        unsigned high[TILES], low[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float x = __expf(p[n][0] - m), y = __expf(p[n][1] - m);
            l += x + y;
            if constexpr (INT8) x *= value_scales[n].x * LIFT, y *= value_scales[n].y * LIFT;
            const __half2 rounded = __floats2half2_rn(x, y);
            high[n] = as_bits(rounded);
            low[n] = as_bits(__floats2half2_rn(x - __low2float(rounded), y - __high2float(rounded)));
        }
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            constexpr bool ODD = TILES == 1;  // the other eight slots of the product are then zero
            const int other = ODD ? n : n + 1;
#pragma unroll
            for (int c = 0; c < V_CHUNKS; ++c)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned x = values[n][0][c].word(j), y = values[n][1][c].word(j);
                    unsigned a[4] = {low_halves(x, y), high_halves(x, y), 0, 0};
                    if constexpr (!ODD) {
                        const unsigned z = values[other][0][c].word(j), w = values[other][1][c].word(j);
                        a[2] = low_halves(z, w), a[3] = high_halves(z, w);
                    }
                    mma(acc[4 * c + j], a, high[n], ODD ? 0 : high[other]);
                    mma(acc[4 * c + j], a, low[n], ODD ? 0 : low[other]);
                }
        }
        load_values(next);
    }

    __device__ __forceinline__ void rescale(float to) {
        const float factor = __expf(m - to);
        const float x = __shfl_sync(ALL_LANES, factor, 8 * t), y = __shfl_sync(ALL_LANES, factor, 8 * t + 4);
#pragma unroll
        for (int j = 0; j < 4 * V_CHUNKS; ++j) acc[j][0] *= x, acc[j][1] *= y, acc[j][2] *= x, acc[j][3] *= y;
        l *= factor;
        m = to;
    }

    /// Shows the state to the block: sums [heads][pitch], then m and l of each head.
    __device__ __forceinline__ void show(float* shared) {
        constexpr int PITCH = decode_pitch(Width);
        float* const mine = shared + int(threadIdx.x) / 32 * DECODE_HEADS * (PITCH + 2);
#pragma unroll
        for (int c = 0; c < V_CHUNKS; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    *reinterpret_cast<float2*>(mine + (2 * t + e) * PITCH + 64 * c + 8 * g + 2 * j) =
                        make_float2(acc[4 * c + j][e] / LIFT, acc[4 * c + j][2 + e] / LIFT);
        l += __shfl_xor_sync(ALL_LANES, l, 1);
        l += __shfl_xor_sync(ALL_LANES, l, 2);
        if (t == 0) {
            mine[DECODE_HEADS * PITCH + g] = m;
            mine[DECODE_HEADS * PITCH + DECODE_HEADS + g] = l;
        }
    }
};

/// Joins the warps' states of the block's heads and writes them to row `split` of partial.
template <int Width, class Element>
__device__ __forceinline__ void join_warps(const Attention<Element>& op, const float* shared, int b, int first_head,
                                           int heads, int split) {
    constexpr int PITCH = decode_pitch(Width), WARP = DECODE_HEADS * (PITCH + 2);
    for (int h = int(threadIdx.x) / 32; h < heads; h += ATTENTION_WARPS) {
        const float* const states = shared + DECODE_HEADS * PITCH + h;
        float m = -infinity(), l = 0, factor[ATTENTION_WARPS];
#pragma unroll
        for (int w = 0; w < ATTENTION_WARPS; ++w) m = fmaxf(m, states[w * WARP]);
#pragma unroll
        for (int w = 0; w < ATTENTION_WARPS; ++w) {
            factor[w] = states[w * WARP] == -infinity() ? 0.0f : __expf(states[w * WARP] - m);
            l += factor[w] * states[w * WARP + DECODE_HEADS];
        }
        float* const out = op.out(b, first_head + h, split);
        for (int d = int(lane()); d < op.head_dim; d += 32) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < ATTENTION_WARPS; ++w) sum += factor[w] * shared[w * WARP + h * PITCH + d];
            out[d] = sum;
        }
        if (lane() == 0) {
            out[op.head_dim] = m;
            out[op.head_dim + 1] = l;
        }
    }
}

template <class Element, int Width>
__device__ __forceinline__ void decode(const Attention<Element>& op, unsigned char* shared) {
    using Warp = DecodeWarp<Element, Width>;
    constexpr int SLOTS = Warp::SLOTS, LANES = Width / 8;
    const int groups = (op.group() + DECODE_HEADS - 1) / DECODE_HEADS;
    const int split = int(blockIdx.x), b = int(blockIdx.z);
    const int kv = int(blockIdx.y) / groups, part = int(blockIdx.y) % groups;
    if (split >= op.splits) return;
    const int first_head = kv * op.group() + part * DECODE_HEADS;
    const int heads = min(DECODE_HEADS, op.group() - part * DECODE_HEADS);
    const int last = op.newest(b), oldest = op.window > 0 ? max(last - op.window + 1, 0) : 0;

    // Steps are counted from the one that holds the oldest visible slot; the new token is no part of them.
    const int origin = oldest / SLOTS * SLOTS, steps = (last - origin + SLOTS - 1) / SLOTS;
    const int share = (steps + op.splits - 1) / op.splits, end = min(steps, (split + 1) * share);
    const int warp = int(threadIdx.x) / 32;
    int step = split * share + warp;
    Warp state(op, op.row(b, kv, 0), oldest, last);
    const auto slot_of = [&](int s) { return s < end ? origin + s * SLOTS : last; };
    state.load_keys(slot_of(step));
    state.load_values(slot_of(step));

    __half* const query = reinterpret_cast<__half*>(shared);
    __half *const new_key = query + DECODE_HEADS * query_pitch(Width), *const new_value = new_key + Width;
    const int i = int(threadIdx.x) % LANES;
    for (int h = int(threadIdx.x) / LANES; h < DECODE_HEADS; h += ATTENTION_THREADS / LANES) {
        Quads x = {};
        if (h < heads) x = query_quads(op, b, 0, last, first_head + h, i);
        store_quads<true>(query + h * query_pitch(Width), x, op.head_dim, i);
    }
    float key_scale = 1, value_scale = 1;
    const bool has_new = split == 0 && warp == 0;
    if (has_new) {  // every group of LANES lanes makes the same rows
        Quads key = query_quads(op, b, 0, last, op.heads + kv, i), value = value_quads(op, b, 0, kv, i);
        key_scale = quantised<Width>(key, op.past_key);
        value_scale = quantised<Width>(value, op.past_key);
        if (int(lane()) < LANES) {
            store_quads<true>(new_key, key, op.head_dim, i);
            store_quads<true>(new_value, value, op.head_dim, i);
            if (part == 0) keep<Width>(op, op.row(b, kv, last), key, value, key_scale, value_scale, i);
        }
    }
    __syncthreads();
    state.query = query + state.g * query_pitch(Width);
    if (has_new) state.start(new_key, new_value, key_scale, value_scale);
    for (; step < end; step += ATTENTION_WARPS) state.step(slot_of(step), slot_of(step + ATTENTION_WARPS));

    __syncthreads();  // q has been read
    float* const sums = reinterpret_cast<float*>(shared);
    state.show(sums);
    __syncthreads();
    join_warps<Width>(op, sums, b, first_head, heads, split);
}

}  // namespace edge
