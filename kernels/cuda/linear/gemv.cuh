// y = x W^T for up to four rows of x, at the speed of the weight's bytes.
//
// Decode reads every weight once and does little else, so the kernel is arranged around the loads: a lane holds 16 bytes
// of codes of two rows and has DEPTH such pairs under way; the first are started before x is normalised, so the prologue
// hides behind them. Each of the codes would cost a conversion and a multiply-add a row of x; the tensor cores take the
// second for nothing, in float32, and even keep the scale groups apart:
//
//   A (16 x 16): lane (g, t) = (lane / 4, lane % 4) gives codes of weight rows g and g + 8, exact halves code - zero.
//   The four lanes t of a row hold four runs of 16 or 32 columns, that is, up to four groups with scales of their own,
//   and an mma sums over t. So B's columns separate them: column 4 m + t holds row m of x in the k of lane t and zeros
//   in the k of the other lanes. After a step, d[row][4 m + t] is the sum over run t for row m; it is then multiplied
//   by its scale in float32. Four of five products are with zero, on units that wait for memory anyway.
//
// A tile of 16 weight rows is worked on by blockDim.x / 32 warps, which split the columns; blockDim.y tiles at a time,
// and the grid strides over the rest. plan.h picks these from N, K and the number of SMs.
#pragma once

#include "sizes.h"
#include "weights.cuh"

namespace edge {

template <int Bytes>
struct Run;
template <>
struct Run<16> {
    uint4 v;
    __device__ __forceinline__ void load(const void* p) { v = load_once(p); }
    __device__ __forceinline__ void clear() { v = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ unsigned word(int i) const { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
};
template <>
struct Run<8> {
    uint2 v;
    __device__ __forceinline__ void load(const void* p) { v = __ldg(static_cast<const uint2*>(p)); }
    __device__ __forceinline__ void clear() { v = make_uint2(0, 0); }
    __device__ __forceinline__ unsigned word(int i) const { return i == 0 ? v.x : v.y; }
};

/// Copies rows of x (M <= GEMV_ROWS) to shared memory in the order of the pairs, normalised if `norm` is not null, and
/// eight zeros behind them. Padding is zero, so codes past the last column count nothing. Ends with a barrier.
template <int Bits>
__device__ __forceinline__ void stage_x(__half* shared, float* scratch, const __half* x, const __half* norm, int rows,
                                        int columns, int pitch, float eps) {
    const int threads = int(blockDim.x * blockDim.y), thread = int(threadIdx.y * blockDim.x + threadIdx.x);
    const int warps = threads / 32;
    if (norm) {
        for (int m = 0; m < rows; ++m) {
            float sum = 0;
            for (int k = 8 * thread; k < columns; k += 8 * threads) sum += sum_of_squares(load_x(x + m * columns, k, columns));
            sum = warp_sum(sum);
            if (lane() == 0) scratch[m * warps + thread / 32] = sum;
        }
        __syncthreads();
    }
    if (thread == 0) store16(shared + rows * pitch, make_uint4(0, 0, 0, 0));
    for (int m = 0; m < rows; ++m) {
        float factor = 0;
        if (norm) {
            for (int w = 0; w < warps; ++w) factor += scratch[m * warps + w];
            factor = rsqrtf(factor / float(columns) + eps);
        }
        for (int k = 8 * thread; k < pitch; k += 8 * threads) {
            uint4 eight = load_x(x + m * columns, k, columns);
            if (norm) eight = normalised(eight, factor, load_x(norm, k, columns));
            store16(shared + m * pitch + k, Unpack<Bits>::interleave(eight));
        }
    }
    __syncthreads();
}

/// The weight rows of a tile: `first` and `second` of lane group g in 0..7 (rows g and g + 8 of the tile), clamped.
struct PlainRows {
    int end;
    __device__ __forceinline__ int first(int tile, int g) const { return min(tile * TILE + g, end - 1); }
    __device__ __forceinline__ int second(int tile, int g) const { return min(tile * TILE + 8 + g, end - 1); }
};
/// Eight gate rows above eight up rows, so that both factors of an output meet in one lane.
struct GateUpRows {
    int outputs;
    __device__ __forceinline__ int first(int tile, int g) const { return min(tile * 8 + g, outputs - 1); }
    __device__ __forceinline__ int second(int tile, int g) const { return outputs + first(tile, g); }
};

/// All tiles first, first + stride, ... < end of this block's row of warps; emit(tile, g, m, a, b) gets the sums of the
/// tile's rows g and g + 8 for row m of x, once, in one thread. All threads of the block call it, and all see what the prologue wrote.
template <int Bits, int RunCodes, class Scale, class Rows, class Prologue, class Emit>
__device__ __forceinline__ void gemv_tiles(const Weight<Bits, Scale>& weight, const __half* x, float* partial, int rows,
                                           int first, int stride, int end, const Rows& rows_of, Prologue prologue,
                                           Emit emit) {
    constexpr int DEPTH = 3, BYTES = RunCodes * Bits / 8, STEP = 4 * RunCodes, PAIRS = Unpack<Bits>::PAIRS;
    using Pairs = typename Unpack<Bits>::Pairs;
    const int columns = weight.columns, pitch = (columns + STEP - 1) / STEP * STEP;
    const int g = int(lane()) / 4, t = int(lane()) % 4;
    const int splits = int(blockDim.x) / 32, split = int(threadIdx.x) / 32;
    const int steps = (pitch / STEP + splits - 1) / splits;  // of a tile, the same for each warp
    const int block_first = first - int(threadIdx.y);        // all warps do as many tiles, for the sake of the barriers
    const int tiles = block_first < end ? (end - block_first + stride - 1) / stride : 0;

    struct Stage {
        Run<BYTES> codes[2];
        unsigned zero[2];
        Scale scale[2][2];
    } stages[DEPTH];

    // Where the next loads go: the two rows' codes, zeros and scales of tile `load_tile`.
    int load_tile = first, load_step = 0;
    const unsigned char* codes[2];
    unsigned zeros[2], scales[2];  // unsigned: an address is then one multiply-add
    const auto open = [&] {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int n = r ? rows_of.second(load_tile, g) : rows_of.first(load_tile, g);
            codes[r] = weight.row(n) + t * BYTES;
            zeros[r] = unsigned(n * weight.zero_words);
            scales[r] = unsigned(n * weight.blocks);
        }
    };
    const auto load = [&](Stage& stage) {
        const int column = (load_step * splits + split) * STEP;
        if (load_tile < end && column < columns) {
            const int mine = column + t * RunCodes, left = column + t % 2 * 2 * RunCodes;
            const unsigned zero_bit = unsigned(weight.block_of(min(mine, columns - 1)) * Bits);
            const unsigned near = unsigned(weight.block_of(min(left, columns - 1)));
            const unsigned far = unsigned(weight.block_of(min(left + RunCodes, columns - 1)));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                stage.codes[r].clear();
                if (mine < columns) stage.codes[r].load(codes[r] + unsigned(column) * Bits / 8);
                stage.zero[r] = __ldg(weight.zeros + (zeros[r] + zero_bit / 32)) >> zero_bit % 32 & ((1u << Bits) - 1);
                stage.scale[r][0] = __ldg(weight.scales + (scales[r] + near));
                stage.scale[r][1] = __ldg(weight.scales + (scales[r] + far));
            }
        }
        if (++load_step == steps) {
            load_step = 0;
            load_tile += stride;
            open();
        }
    };

    float sum[2][2] = {};  // [row of the lane][pair of rows of x]
    const auto multiply = [&](const Stage& stage, int step) {
        const int column = (step * splits + split) * STEP;
        if (column >= columns) return;
        const Unpack<Bits> unpack[2] = {Unpack<Bits>(stage.zero[0]), Unpack<Bits>(stage.zero[1])};
        float d[2][4] = {};
        // This lane's x for each pair of rows, or over and over the eight zeros behind x: no branch, one address.
        const __half* from[2];
        int next[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int row = 2 * m + g / 4;
            const bool here = g % 4 == t && row < rows;
            from[m] = x + (here ? row * pitch + column + t * RunCodes : rows * pitch);
            next[m] = here ? 2 * PAIRS : 0;
        }
#pragma unroll
        for (int w = 0; w < BYTES / 4; ++w) {
            __half2 pairs[2][PAIRS];
            unpack[0](stage.codes[0].word(w), pairs[0]);
            unpack[1](stage.codes[1].word(w), pairs[1]);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (2 * m >= rows) break;
                const Pairs b = *reinterpret_cast<const Pairs*>(from[m] + w * next[m]);
                mma(d[m], {as_bits(pairs[0][0]), as_bits(pairs[1][0]), as_bits(pairs[0][1]), as_bits(pairs[1][1])}, b.x,
                    b.y);
                if constexpr (PAIRS == 4) {
                    mma(d[m], {as_bits(pairs[0][2]), as_bits(pairs[1][2]), as_bits(pairs[0][3]), as_bits(pairs[1][3])},
                        b.z, b.w);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int m = 0; m < 2; ++m)
                sum[r][m] += d[m][2 * r] * to_float(stage.scale[r][0]) + d[m][2 * r + 1] * to_float(stage.scale[r][1]);
    };

    // The lane's columns of d are 2 t and 2 t + 1: row t / 2 of a pair of rows of x, half of the runs.
    const auto finish = [&](int tile, int parity) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int m = 0; m < 2; ++m) sum[r][m] += __shfl_xor_sync(ALL_LANES, sum[r][m], 1);
        const int warps = splits * int(blockDim.y);
        float* const buffer = partial + (parity * warps + int(threadIdx.y) * splits) * rows * TILE;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int row = 2 * m + t / 2;
            if (t % 2 == 0 && row < rows) {
                buffer[(split * rows + row) * TILE + g] = sum[0][m];
                buffer[(split * rows + row) * TILE + g + 8] = sum[1][m];
            }
            sum[0][m] = sum[1][m] = 0;
        }
        // One barrier a tile: the next writes go to the other buffer.
        if (splits == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
        const int output = int(threadIdx.x);
        if (output < 8 * rows && tile < end) {
            float a = 0, b = 0;
            for (int s = 0; s < splits; ++s) {
                a += buffer[(s * rows + output / 8) * TILE + output % 8];
                b += buffer[(s * rows + output / 8) * TILE + output % 8 + 8];
            }
            emit(tile, output % 8, output / 8, a, b);
        }
    };

    // The first round only loads, and x is made ready behind it.
    open();
    int step = 0, tile = first, parity = 0;
    for (int round = 0, done = -DEPTH; done < tiles * steps; ++round) {
        if (round == 1) prologue();
#pragma unroll
        for (int i = 0; i < DEPTH; ++i, ++done) {
            const bool due = round > 0 && done < tiles * steps;
            if (due && tile < end) multiply(stages[i], step);
            load(stages[i]);
            if (due && ++step == steps) {
                finish(tile, parity);
                step = 0;
                tile += stride;
                parity ^= 1;
            }
        }
    }
}

}  // namespace edge
