// y = x W^T for many rows of x (prefill): 64 x 64 tiles on the tensor cores, four warps of 32 x 32.
//
// A weight becomes half((code - zero) * scale) on its way to shared memory: one rounding, as in any float16 engine; sums
// are float32. The next tile's codes and x are on their way to registers while this one is multiplied, and two buffers
// of shared memory leave one barrier a tile. Inside of eight columns, x and the weight share the order of the pairs.
#pragma once

#include "sizes.h"
#include "weights.cuh"

namespace edge {

/// (code - zero) * scale for the codes of a word, in the order of the pairs.
template <int Bits>
__device__ __forceinline__ void scaled(unsigned word, unsigned zero, __half scale, unsigned* out) {
    __half2 pairs[Unpack<Bits>::PAIRS];
    Unpack<Bits>{zero}(word, pairs);
#pragma unroll
    for (int p = 0; p < Unpack<Bits>::PAIRS; ++p) out[p] = as_bits(__hmul2(pairs[p], __half2half2(scale)));
}
template <int Bits>
__device__ __forceinline__ void scaled(unsigned word, unsigned zero, float scale, unsigned* out) {
    __half2 pairs[Unpack<Bits>::PAIRS];
    Unpack<Bits>{zero}(word, pairs);
#pragma unroll
    for (int p = 0; p < Unpack<Bits>::PAIRS; ++p) {
        const float2 pair = __half22float2(pairs[p]);
        out[p] = as_bits(__floats2half2_rn(pair.x * scale, pair.y * scale));
    }
}

/// rows_of(tile, r) is the weight row of row r (< GEMM_N) of an output tile, negative where there is none;
/// emit(tile, m, warp column, lane column, d) gets d[fragment][which] for row m of x: column 8 f + 2 t + which of 32.
template <int Bits, class Scale, class Rows, class Emit>
__device__ __forceinline__ void gemm_tiles(const Weight<Bits, Scale>& weight, const __half* x, const __half* norm,
                                           float eps, int rows, int tiles_n, unsigned char* shared, const Rows& rows_of,
                                           Emit emit) {
    constexpr int HALVES = (GEMM_M + GEMM_N) * GEMM_PITCH, WORDS = 16 * Bits / 32, PAIRS = Unpack<Bits>::PAIRS;
    __half* const tiles = reinterpret_cast<__half*>(shared);  // two buffers of x's tile and the weight's
    float* const factors = reinterpret_cast<float*>(shared + 2 * HALVES * 2);
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), warp = thread / 32;
    const int g = int(lane()) / 4, t = int(lane()) % 4, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
    const int columns = weight.columns, steps = (columns + GEMM_K - 1) / GEMM_K;
    const int tiles_m = (rows + GEMM_M - 1) / GEMM_M;

    for (int work = int(blockIdx.x); work < tiles_m * tiles_n; work += int(gridDim.x)) {
        const int row0 = work % tiles_m * GEMM_M, tile = work / tiles_m;
        if (norm) {
            for (int r = warp; r < GEMM_M && row0 + r < rows; r += GEMM_THREADS / 32) {
                const __half* const row = x + (long long)(row0 + r) * columns;
                float sum = 0;
                for (int k = 8 * int(lane()); k < columns; k += 256) sum += sum_of_squares(load_x(row, k, columns));
                sum = warp_sum(sum);
                if (lane() == 0) factors[r] = rsqrtf(sum / float(columns) + eps);
            }
        }
        __syncthreads();  // the factors are there, and the tile before is done with

        // This thread's share: eight columns of every 16th row of x, two runs of 16 codes of one row of the weight.
        const int x_row = thread / 8, x_column = thread % 8 * 8;
        const int w_row = thread / 2, w_column = thread % 2 * 32, n = rows_of(tile, w_row);
        uint4 next_x[4];
        unsigned next_codes[2][WORDS], next_zero[2];
        Scale next_scale[2];
        const auto load = [&](int k0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int m = row0 + x_row + 16 * i;
                next_x[i] = m < rows ? load_x(x + (long long)(m)*columns, k0 + x_column, columns) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = k0 + w_column + 16 * i;
                if (n >= 0 && column < columns) {
                    const uint2* const codes = reinterpret_cast<const uint2*>(weight.row(n) + column * Bits / 8);
#pragma unroll
                    for (int v = 0; v < WORDS / 2; ++v) {
                        const uint2 two = __ldg(codes + v);
                        next_codes[i][2 * v] = two.x;
                        next_codes[i][2 * v + 1] = two.y;
                    }
                    next_zero[i] = weight.zero(n, column);
                    next_scale[i] = weight.scale(n, column);
                } else {
#pragma unroll
                    for (int v = 0; v < WORDS; ++v) next_codes[i][v] = 0;
                    next_zero[i] = 0;
                    next_scale[i] = Scale(0.0f);
                }
            }
        };
        const auto store = [&](int k0, __half* buffer) {
            const uint4 weights = norm ? load_x(norm, k0 + x_column, columns) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = x_row + 16 * i;
                uint4 eight = next_x[i];
                if (norm) eight = normalised(eight, row0 + r < rows ? factors[r] : 0.0f, weights);
                store16(buffer + r * GEMM_PITCH + x_column, Unpack<Bits>::interleave(eight));
            }
            __half* const to = buffer + GEMM_M * GEMM_PITCH + w_row * GEMM_PITCH + w_column;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned halves[8];
#pragma unroll
                for (int v = 0; v < WORDS; ++v) scaled<Bits>(next_codes[i][v], next_zero[i], next_scale[i], halves + v * PAIRS);
                store16(to + 16 * i, make_uint4(halves[0], halves[1], halves[2], halves[3]));
                store16(to + 16 * i + 8, make_uint4(halves[4], halves[5], halves[6], halves[7]));
            }
        };

        float d[2][4][4] = {};
        load(0);
        store(0, tiles);
        for (int step = 0; step < steps; ++step) {
            __syncthreads();
            if (step + 1 < steps) load((step + 1) * GEMM_K);
            const __half* const buffer = tiles + step % 2 * HALVES;
            // ldmatrix: lanes 0-7, 8-15, 16-23, 24-31 give the rows of matrices 0, 1, 2, 3.
            const __half* const from_x = buffer + (warp_m + int(lane()) % 16) * GEMM_PITCH + int(lane()) / 16 * 8;
            const __half* const from_w = buffer + GEMM_M * GEMM_PITCH +
                                         (warp_n + int(lane()) % 8 + int(lane()) / 16 * 8) * GEMM_PITCH +
                                         int(lane()) / 8 % 2 * 8;
#pragma unroll
            for (int k = 0; k < GEMM_K; k += 16) {
                unsigned a[2][4], b[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    load_matrices(a[i], from_x + 16 * i * GEMM_PITCH + k);
                    load_matrices(b[i], from_w + 16 * i * GEMM_PITCH + k);
                }
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int f = 0; f < 4; ++f) mma(d[i][f], a[i], b[f / 2][f % 2 * 2], b[f / 2][f % 2 * 2 + 1]);
            }
            if (step + 1 < steps) store((step + 1) * GEMM_K, tiles + (step + 1) % 2 * HALVES);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = row0 + warp_m + 16 * i + 8 * half + g;
                if (m >= rows) continue;
                float out[4][2];
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    out[f][0] = d[i][f][2 * half];
                    out[f][1] = d[i][f][2 * half + 1];
                }
                emit(tile, m, warp_n, 2 * t, out);
            }
    }
}

}  // namespace edge
