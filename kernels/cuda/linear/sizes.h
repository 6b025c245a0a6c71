// Sizes that the kernels and their plans agree on.
#pragma once

#ifdef __CUDACC__
#define EDGE_BOTH __host__ __device__
#else
#define EDGE_BOTH
#endif

namespace edge {

constexpr int GEMV_ROWS = 4;      // of x, at most, that one pass over the weights serves
constexpr int GEMV_THREADS = 512; // a block's limit
constexpr int TILE = 16;          // rows of the weight that a warp works on at a time; 8 outputs for SwiGLU
constexpr int GEMM_THREADS = 128;
constexpr int GEMM_M = 64, GEMM_N = 64, GEMM_K = 64;
constexpr int GEMM_PITCH = GEMM_K + 8;  // halves: ldmatrix then touches each bank once
constexpr int ANY_SHARED = 48 * 1024;
constexpr int GEMM_SHARED = 2 * (GEMM_M + GEMM_N) * GEMM_PITCH * 2 + GEMM_M * 4;

/// Codes of a lane in one load, in bytes of 8 or 16: a run of codes under one scale.
EDGE_BOTH constexpr int run_codes(int bits, int block) { return bits == 8 || block == 16 ? 16 : 32; }

/// Columns, padded to what the four lanes of a row load at a time; so many halves has a row of x in shared memory.
EDGE_BOTH constexpr int padded_columns(int columns, int bits, int block) {
    const int step = 4 * run_codes(bits, block);
    return (columns + step - 1) / step * step;
}

/// Shared memory of a GEMV's x: its rows and eight zeros.
EDGE_BOTH constexpr int staged_bytes(int rows, int columns, int bits, int block) {
    return (rows * padded_columns(columns, bits, block) + 8) * 2;
}

/// Shared memory of a GEMV: x, and two buffers of partial sums of each warp.
EDGE_BOTH constexpr int gemv_shared(int rows, int columns, int bits, int block, int warps) {
    return staged_bytes(rows, columns, bits, block) + 2 * warps * rows * TILE * 4;
}

}  // namespace edge
