// EdgeGroupNormSilu: y = (x - mean) / sqrt(var + eps) * weight[c] + bias[c], then silu if asked for, over groups of
// channels of x [B, C, N].
//
// A group is C / groups * N consecutive numbers. Entry points:
//   edge_group_norm        one block a group: x is read once if the group fits into its registers, else a second time
//                          (from the L2 cache, as a rule)
//   edge_group_norm_stats  several blocks a group, for groups so few and large that one block each would leave most of
//   edge_group_norm_apply  the device idle: two launches, with the parts' statistics in a workspace between them
// Arguments: x, weight, bias, y, (partial float32 [B * groups, 32, 2] for the two,) channels, groups, size (N), silu,
// eps. Variance: the mean and the sum of squares about it of each eight numbers, joined pair by pair (Chan, Golub and
// LeVeque 1979, "Updating formulae"), which loses nothing where the mean is large.
#pragma once

#include "../common/device.cuh"
#include "sizes.h"

namespace edge {

/// Of `count` numbers: the mean and the sum of the squared distances to it.
struct Moments {
    float count, mean, squares;

    __device__ __forceinline__ void join(const Moments& other) {
        const float sum = count + other.count;
        if (sum == 0) return;
        const float share = other.count / sum, distance = other.mean - mean;
        squares += other.squares + distance * distance * count * share;
        mean += distance * share;
        count = sum;
    }
};

__device__ __forceinline__ Moments joined_over_warp(Moments m) {
    for (int step = 16; step; step /= 2)
        m.join({__shfl_xor_sync(ALL_LANES, m.count, step), __shfl_xor_sync(ALL_LANES, m.mean, step),
                __shfl_xor_sync(ALL_LANES, m.squares, step)});
    return m;
}

/// In every thread; `scratch` is 32 of shared memory.
__device__ __forceinline__ Moments joined_over_block(Moments m, Moments* scratch) {
    m = joined_over_warp(m);
    if (lane() == 0) scratch[threadIdx.x / 32] = m;
    __syncthreads();
    return joined_over_warp(lane() < blockDim.x / 32 ? scratch[lane()] : Moments{0, 0, 0});
}

/// Numbers that a thread works on at a time: eight of one channel, or one where rows are no multiple of eight.
template <int Count>
struct Pack;
template <>
struct Pack<8> {
    uint4 v;
    __device__ __forceinline__ void load(const __half* p) { v = load16(p); }
    __device__ __forceinline__ void unpack(float (&x)[8]) const {
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(as_half2(words[i]));
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
    static __device__ __forceinline__ void store(__half* p, const float (&x)[8]) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = as_bits(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
        store16(p, make_uint4(words[0], words[1], words[2], words[3]));
    }
};
template <>
struct Pack<1> {
    __half v;
    __device__ __forceinline__ void load(const __half* p) { v = *p; }
    __device__ __forceinline__ void unpack(float (&x)[1]) const { x[0] = __half2float(v); }
    static __device__ __forceinline__ void store(__half* p, const float (&x)[1]) { *p = __float2half_rn(x[0]); }
};

struct GroupNorm {
    const __half *x, *weight, *bias;
    __half* y;
    int channels, groups, size, silu;
    float eps;

    __device__ __forceinline__ int group_channels() const { return channels / groups; }
    __device__ __forceinline__ unsigned numbers() const { return unsigned(group_channels()) * unsigned(size); }
};

/// The packs first, first + stride, ... < end of a group, `group` of all [B, groups].
template <int Count>
struct GroupPart {
    const GroupNorm& op;
    int group;
    unsigned first, stride, end;
    Pack<Count> held[NORM_HELD];

    __device__ __forceinline__ GroupPart(const GroupNorm& op, int group, unsigned first, unsigned stride, unsigned end)
        : op(op), group(group), first(first), stride(stride), end(end) {}

    __device__ __forceinline__ long long base() const { return (long long)(group)*op.numbers(); }

    static __device__ __forceinline__ Moments moments(const Pack<Count>& pack) {
        float x[Count], sum = 0, squares = 0;
        pack.unpack(x);
#pragma unroll
        for (int i = 0; i < Count; ++i) sum += x[i];
        const float mean = sum / Count;
#pragma unroll
        for (int i = 0; i < Count; ++i) squares += (x[i] - mean) * (x[i] - mean);
        return {float(Count), mean, squares};
    }

    __device__ __forceinline__ unsigned place(unsigned batch, int i) const {
        return first + (batch * NORM_HELD + unsigned(i)) * stride;
    }
    __device__ __forceinline__ unsigned batches() const {
        return first < end ? (end - first + NORM_HELD * stride - 1) / (NORM_HELD * stride) : 0;
    }
    /// All loads of a batch are under way before the first of its numbers is used.
    __device__ __forceinline__ void load(unsigned batch) {
        const __half* const x = op.x + base();
#pragma unroll
        for (int i = 0; i < NORM_HELD; ++i)
            if (place(batch, i) < end) held[i].load(x + place(batch, i) * Count);
    }

    /// The last batch comes first, so that the first one is held at the end.
    __device__ __forceinline__ Moments statistics() {
        Moments all = {0, 0, 0};
        for (unsigned batch = batches(); batch-- > 0;) {
            load(batch);
#pragma unroll
            for (int i = 0; i < NORM_HELD; ++i)
                if (place(batch, i) < end) all.join(moments(held[i]));
        }
        return all;
    }

    __device__ __forceinline__ void finish(const Pack<Count>& pack, unsigned at, float mean, float factor) const {
        const int channel = group % op.groups * op.group_channels() + int(at * Count / unsigned(op.size));
        const float weight = factor * __half2float(op.weight[channel]), bias = __half2float(op.bias[channel]);
        float x[Count];
        pack.unpack(x);
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            x[i] = (x[i] - mean) * weight + bias;
            if (op.silu) x[i] = x[i] / (1.0f + __expf(-x[i]));
        }
        Pack<Count>::store(op.y + base() + at * Count, x);
    }

    /// Writes y; the first batch need not be read again if `statistics` has left it.
    template <bool Held>
    __device__ __forceinline__ void apply(const Moments& all) {
        const float factor = rsqrtf(all.squares / all.count + op.eps);
        for (unsigned batch = 0; batch < batches(); ++batch) {
            if (!Held || batch > 0) load(batch);
#pragma unroll
            for (int i = 0; i < NORM_HELD; ++i)
                if (place(batch, i) < end) finish(held[i], place(batch, i), all.mean, factor);
        }
    }
};

template <int Count>
__device__ __forceinline__ void whole_group(const GroupNorm& op) {
    __shared__ Moments scratch[32];
    GroupPart<Count> part(op, int(blockIdx.x), threadIdx.x, blockDim.x, op.numbers() / Count);
    part.template apply<true>(joined_over_block(part.statistics(), scratch));
}

/// Blocks are (part, group); the parts of a group are consecutive.
template <int Count>
__device__ __forceinline__ GroupPart<Count> part_of_group(const GroupNorm& op) {
    const unsigned packs = op.numbers() / Count, share = (packs + gridDim.x - 1) / gridDim.x;
    const unsigned begin = blockIdx.x * share;
    return {op, int(blockIdx.y), begin + threadIdx.x, blockDim.x, min(begin + share, packs)};
}

template <int Count>
__device__ __forceinline__ void part_statistics(const GroupNorm& op, float* partial) {
    __shared__ Moments scratch[32];
    const Moments m = joined_over_block(part_of_group<Count>(op).statistics(), scratch);
    if (threadIdx.x == 0)
        reinterpret_cast<float2*>(partial)[blockIdx.y * NORM_PARTS + blockIdx.x] = make_float2(m.mean, m.squares);
}

template <int Count>
__device__ __forceinline__ void part_apply(const GroupNorm& op, const float* partial) {
    GroupPart<Count> part = part_of_group<Count>(op);
    const unsigned packs = op.numbers() / Count, share = (packs + gridDim.x - 1) / gridDim.x, i = lane();
    Moments m = {0, 0, 0};
    if (i < gridDim.x && i * share < packs) {
        const float2 stored = reinterpret_cast<const float2*>(partial)[blockIdx.y * NORM_PARTS + i];
        m = {float((min((i + 1) * share, packs) - i * share) * Count), stored.x, stored.y};
    }
    part.template apply<false>(joined_over_warp(m));
}

}  // namespace edge

EDGE_KERNEL(edge::NORM_THREADS)
void edge_group_norm(const __half* x, const __half* weight, const __half* bias, __half* y, int channels, int groups,
                     int size, int silu, float eps) {
    const edge::GroupNorm op{x, weight, bias, y, channels, groups, size, silu, eps};
    if (size % 8 == 0) {
        edge::whole_group<8>(op);
    } else {
        edge::whole_group<1>(op);
    }
}
EDGE_ENTRY(edge_group_norm);

EDGE_KERNEL(edge::NORM_PART_THREADS)
void edge_group_norm_stats(const __half* x, const __half* weight, const __half* bias, __half* y, float* partial,
                           int channels, int groups, int size, int silu, float eps) {
    const edge::GroupNorm op{x, weight, bias, y, channels, groups, size, silu, eps};
    if (size % 8 == 0) {
        edge::part_statistics<8>(op, partial);
    } else {
        edge::part_statistics<1>(op, partial);
    }
}
EDGE_ENTRY(edge_group_norm_stats);

EDGE_KERNEL(edge::NORM_PART_THREADS)
void edge_group_norm_apply(const __half* x, const __half* weight, const __half* bias, __half* y, const float* partial,
                           int channels, int groups, int size, int silu, float eps) {
    const edge::GroupNorm op{x, weight, bias, y, channels, groups, size, silu, eps};
    if (size % 8 == 0) {
        edge::part_apply<8>(op, partial);
    } else {
        edge::part_apply<1>(op, partial);
    }
}
EDGE_ENTRY(edge_group_norm_apply);
