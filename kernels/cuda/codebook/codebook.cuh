// EdgeCodebook: y[b, c, t] = sum over q of tables[q * size + codes[b, q, t], c], summed in float32, channels first.
//
// Entry point: edge_codebook. Arguments: codes [B, Q, T], tables [Q * size, C], y [B, C, T], batch, books, positions,
// channels, size. A table's row is contiguous along channels and the output along positions, so a block gathers a tile
// of positions x channels, 16 bytes a thread, and turns it in shared memory; both sides then move whole lines.
// A code outside of 0 .. size - 1 reads nothing and gives NaN.
#pragma once

#include "../common/device.cuh"
#include "sizes.h"

namespace edge {

/// Adds eight of a table row's channels, from c on; where rows are no multiple of 8, each by itself.
__device__ __forceinline__ void add_channels(float (&sum)[8], const __half* row, int c, int channels) {
    if (channels % 8 == 0) {
        const uint4 v = load16(row + c);
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(as_half2(words[i]));
            sum[2 * i] += pair.x;
            sum[2 * i + 1] += pair.y;
        }
    } else {
        for (int i = 0; i < 8 && c + i < channels; ++i) sum[i] += __half2float(row[c + i]);
    }
}

__device__ __forceinline__ void codebook(const int* codes, const __half* tables, __half* y, int books, int positions,
                                         int channels, int size) {
    constexpr int VECTORS = CODEBOOK_POSITIONS / 8;
    __shared__ uint4 tile[CODEBOOK_CHANNELS * VECTORS];
    // Of channel c, the positions around t. Channels 8 apart, which neighbouring threads write at the same time, have
    // the same vector in different banks.
    const auto vector_of = [&](int c, int t) { return tile + c * VECTORS + (t / 8 ^ c / 8 % VECTORS); };
    const int t0 = int(blockIdx.x) * CODEBOOK_POSITIONS, c0 = int(blockIdx.y) * CODEBOOK_CHANNELS, b = int(blockIdx.z);
    const int count = min(CODEBOOK_CHANNELS, channels - c0), chunks = (count + 7) / 8;
    const int here = min(CODEBOOK_POSITIONS, positions - t0);

    const int* const mine = codes + (long long)(b)*books * positions + t0;
    for (int item = int(threadIdx.x); item < here * chunks; item += CODEBOOK_THREADS) {
        const int t = item / chunks, c = item % chunks * 8;
        float sum[8] = {};
#pragma unroll 4
        for (int q = 0; q < books; ++q) {
            const int code = mine[(long long)(q)*positions + t];
            if (code < 0 || code >= size) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] = __int_as_float(0x7fffffff);
            } else {
                add_channels(sum, tables + ((long long)(q)*size + code) * channels, c0 + c, channels);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) reinterpret_cast<__half*>(vector_of(c + i, t))[t % 8] = __float2half_rn(sum[i]);
    }
    __syncthreads();

    __half* const out = y + ((long long)(b)*channels + c0) * positions + t0;
    if (positions % 8 == 0) {  // rows are then whole vectors, and so is what there is of the last tile
        for (int item = int(threadIdx.x); item < count * VECTORS; item += CODEBOOK_THREADS) {
            const int c = item / VECTORS, t = item % VECTORS * 8;
            if (t < here) store16(out + (long long)(c)*positions + t, *vector_of(c, t));
        }
    } else {
        for (int item = int(threadIdx.x); item < count * CODEBOOK_POSITIONS; item += CODEBOOK_THREADS) {
            const int c = item / CODEBOOK_POSITIONS, t = item % CODEBOOK_POSITIONS;
            if (t < here) out[(long long)(c)*positions + t] = reinterpret_cast<const __half*>(vector_of(c, t))[t % 8];
        }
    }
}

}  // namespace edge

EDGE_KERNEL(edge::CODEBOOK_THREADS, 4)
void edge_codebook(const int* codes, const __half* tables, __half* y, int, int books, int positions, int channels,
                   int size) {
    edge::codebook(codes, tables, y, books, positions, channels, size);
}
EDGE_ENTRY(edge_codebook);
