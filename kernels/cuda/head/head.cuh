// EdgeHead: logits = norm(x) W^T for a range of the vocabulary's rows, and of every 256 rows the k largest, found while
// they are still in shared memory; EdgeMergeTop: the k largest of all tiles.
//
// Entry points: edge_head_w<bits>_<scales> (x, norm, codes, scales, zeros, rows, logits or null, values, ids, B, V, K,
// block, k, eps) and edge_merge_top (values, ids, top values, top ids, B, tiles, k); k <= 64.
// Rows of `rows` = {first, end} alone are read: a tile outside of them costs its outputs' bytes.
#pragma once

#include "../common/select.h"
#include "../linear/gemv.cuh"
#include "sizes.h"

namespace edge {

using Key = unsigned long long;

/// Larger value first, then lower id: one integer that sorts so. Ids are below 2^31, so their complement has its top bit
/// set; a missing entry has it clear and sorts below every entry of the same value.
__device__ __forceinline__ Key key_of(float value, unsigned low) {
    const unsigned bits = __float_as_uint(value);
    return Key(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | low;
}
__device__ __forceinline__ float value_of(Key key) {
    const unsigned bits = unsigned(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ int id_of(Key key) {
    const unsigned low = unsigned(key);
    return low & 0x80000000u ? int(~low) : -1;
}

/// Of this lane's key and that of lane ^ step, the larger if `up`.
__device__ __forceinline__ Key exchange(Key key, int step, bool up) {
    const Key other = __shfl_xor_sync(ALL_LANES, key, step);
    return (key > other) == up ? key : other;
}

/// A warp's 32 keys in falling order (bitonic sort).
__device__ __forceinline__ Key sorted(Key key) {
    const unsigned at = lane();
#pragma unroll
    for (unsigned size = 2; size <= 32; size *= 2)
#pragma unroll
        for (unsigned step = size / 2; step; step /= 2) {
            key = exchange(key, int(step), ((at & step) == 0) == ((at & size) == 0 || size == 32));
        }
    return key;
}

/// The 64 largest of two falling lists of 64, falling; a list's entry i is in lane i % 32, register i / 32.
__device__ __forceinline__ void merge(Key (&mine)[2], Key first, Key second) {
    // Against the other list backwards, the larger of each pair are the 64 largest, and bitonic.
    mine[0] = max(mine[0], __shfl_xor_sync(ALL_LANES, second, 31));
    mine[1] = max(mine[1], __shfl_xor_sync(ALL_LANES, first, 31));
    const Key low = min(mine[0], mine[1]);
    mine[0] = max(mine[0], mine[1]);
    mine[1] = low;
#pragma unroll
    for (int step = 16; step; step /= 2) {
        const bool up = (lane() & unsigned(step)) == 0;
        mine[0] = exchange(mine[0], step, up);
        mine[1] = exchange(mine[1], step, up);
    }
}

/// How many of a falling list of 32 are larger than `key`.
__device__ __forceinline__ int larger(const Key* list, Key key) {
    int count = 0;
#pragma unroll
    for (int step = 16; step; step /= 2) count += list[count + step - 1] > key ? step : 0;
    return count + (list[count] > key);
}

template <class Scale>
struct Head {
    const __half *x, *norm;
    const int* codes;
    const Scale* scales;
    const int *zeros, *range;
    float *logits, *values;
    int* ids;
    int batch, vocabulary, columns, block, top;
    float eps;
};

/// The `top` largest of a tile's logits; all 256 threads call it, the logits are visible to all.
__device__ __forceinline__ void top_of_tile(const float* logits, Key* lists, int row0, int first, int end, int top,
                                            float* values, int* ids) {
    const int thread = int(threadIdx.y * 32 + threadIdx.x), warp = int(threadIdx.y), row = row0 + thread;
    const bool there = row >= first && row < end;
    const Key key = sorted(there ? key_of(logits[thread], ~unsigned(row)) : key_of(-infinity(), unsigned(thread)));
    lists[thread] = key;
    __syncthreads();
    int rank = int(lane());
    for (int w = 0; w < HEAD_WARPS; ++w)
        if (w != warp) rank += larger(lists + 32 * w, key);
    if (rank < top) {
        values[rank] = value_of(key);
        ids[rank] = id_of(key);
    }
    __syncthreads();
}

template <int Bits, int RunCodes, class Scale>
__device__ __forceinline__ void head_runs(const Head<Scale>& op, unsigned char* shared) {
    const Weight<Bits, Scale> weight(op.codes, op.scales, op.zeros, op.columns, op.block);
    const int pitch = (op.columns + 4 * RunCodes - 1) / (4 * RunCodes) * (4 * RunCodes);
    const int batch0 = int(blockIdx.y) * GEMV_ROWS, rows = min(op.batch - batch0, GEMV_ROWS);
    float* const partial = reinterpret_cast<float*>(shared);
    Key* const lists = reinterpret_cast<Key*>(shared);
    float* const logits = reinterpret_cast<float*>(shared + head_scratch(rows));  // [rows][HEAD_TILE]
    __half* const x = reinterpret_cast<__half*>(logits + rows * HEAD_TILE);

    const int row0 = int(blockIdx.x) * HEAD_TILE, thread = int(threadIdx.y * 32 + threadIdx.x);
    const int first = max(op.range[0], row0), end = min(min(op.range[1], op.vocabulary), row0 + HEAD_TILE);
    for (int m = 0; m < rows; ++m) logits[m * HEAD_TILE + thread] = -infinity();
    if (first < end) {
        const auto prologue = [&] {
            stage_x<Bits>(x, partial, op.x + (long long)(batch0)*op.columns, op.norm, rows, op.columns, pitch, op.eps);
        };
        const auto keep = [&](int m, int row, float sum) {
            if (row >= first && row < end) logits[m * HEAD_TILE + row - row0] = sum;
        };
        gemv_tiles<Bits, RunCodes>(weight, x, partial, rows, first / TILE + int(threadIdx.y), HEAD_WARPS,
                                   (end + TILE - 1) / TILE, PlainRows{op.vocabulary}, prologue,
                                   [&](int tile, int g, int m, float a, float b) {
                                       keep(m, tile * TILE + g, a);
                                       keep(m, tile * TILE + g + 8, b);
                                   });
    }
    __syncthreads();
    for (int m = 0; m < rows; ++m) {
        if (op.logits && row0 + thread < op.vocabulary) {
            op.logits[(long long)(batch0 + m) * op.vocabulary + row0 + thread] = logits[m * HEAD_TILE + thread];
        }
        const long long at = ((long long)(batch0 + m) * gridDim.x + blockIdx.x) * op.top;
        top_of_tile(logits + m * HEAD_TILE, lists, row0, first, end, op.top, op.values + at, op.ids + at);
    }
}

template <int Bits, class Scale>
__device__ __forceinline__ void head(const Head<Scale>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    if constexpr (Bits == 4) {
        if (op.block != 16) return head_runs<4, 32>(op, shared);
    }
    head_runs<Bits, 16>(op, shared);
}

/// One block a row of the batch: each warp keeps a falling list of 64 and merges the tiles whose best is better than its
/// last; then the warps' lists are merged in pairs.
__device__ __forceinline__ void merge_top(const float* values, const int* ids, float* top_values, int* top_ids, int tiles,
                                          int top) {
    __shared__ Key lists[MERGE_WARPS][64];
    const int warp = int(threadIdx.x) / 32, at = int(lane());
    values += (long long)(blockIdx.x) * tiles * top;
    ids += (long long)(blockIdx.x) * tiles * top;
    const Key nothing = key_of(-infinity(), 0);
    const auto read = [&](int tile, int i) {
        if (i >= top) return nothing;
        const int id = ids[tile * top + i];
        return key_of(values[tile * top + i], id < 0 ? 0u : ~unsigned(id));
    };

    Key mine[2] = {nothing, nothing};
    for (int tile0 = warp * 32; tile0 < tiles; tile0 += MERGE_WARPS * 32) {
        const Key best = tile0 + at < tiles ? read(tile0 + at, 0) : nothing;
        for (int i = 0; i < 32; ++i) {
            const Key last = __shfl_sync(ALL_LANES, mine[1], 31);
            if (__shfl_sync(ALL_LANES, best, i) > last) merge(mine, read(tile0 + i, at), read(tile0 + i, at + 32));
        }
    }
    for (int others = MERGE_WARPS / 2; others; others /= 2) {
        lists[warp][at] = mine[0];
        lists[warp][at + 32] = mine[1];
        __syncthreads();
        if (warp < others) merge(mine, lists[warp + others][at], lists[warp + others][at + 32]);
        __syncthreads();
    }
    if (warp) return;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (at + 32 * i < top) {
            top_values[blockIdx.x * top + at + 32 * i] = value_of(mine[i]);
            top_ids[blockIdx.x * top + at + 32 * i] = id_of(mine[i]);
        }
}

}  // namespace edge

// --- entry points ---------------------------------------------------------------------------------------------------
#define EDGE_HEAD(bits, Scale, format)                                                                                \
    EDGE_KERNEL(256, 2)                                                                                               \
    void edge_head_##format(const __half* x, const __half* norm, const int* codes, const Scale* scales,               \
                            const int* zeros, const int* rows, float* logits, float* values, int* ids, int B, int V,  \
                            int K, int block, int k, float eps) {                                                     \
        edge::head<bits>(                                                                                             \
            edge::Head<Scale>{x, norm, codes, scales, zeros, rows, logits, values, ids, B, V, K, block, k, eps});     \
    }                                                                                                                 \
    EDGE_ENTRY(edge_head_##format);

EDGE_IF(EDGE_head_w4_f16, EDGE_HEAD(4, __half, w4_f16))
EDGE_IF(EDGE_head_w4_f32, EDGE_HEAD(4, float, w4_f32))
EDGE_IF(EDGE_head_w8_f16, EDGE_HEAD(8, __half, w8_f16))
EDGE_IF(EDGE_head_w8_f32, EDGE_HEAD(8, float, w8_f32))

/// values, ids [B, tiles, k], each tile's in falling order -> top_values, top_ids [B, k].
EDGE_KERNEL(256)
void edge_merge_top(const float* values, const int* ids, float* top_values, int* top_ids, int, int tiles, int k) {
    edge::merge_top(values, ids, top_values, top_ids, tiles, k);
}
EDGE_ENTRY(edge_merge_top);
