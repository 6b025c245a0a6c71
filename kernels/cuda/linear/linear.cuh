// EdgeLinear and its fused forms: y = act(norm(x) W^T + bias) + residual, W of 4 or 8 bits.
//
// Entry points (op: linear, linear_residual, norm_linear, norm_linear_swiglu; bits 4, 8; scales f16, f32):
//   edge_<op>_w<bits>_<scales>_gemv   M <= 4
//   edge_<op>_w<bits>_<scales>_gemm   any M, tensor cores
//   edge_<op>_w<bits>_<scales>_any    one of the two by M: for plugins whose kernel is chosen before M is known
// Arguments, only those the op has: x, norm, codes, scales, zeros, bias, residual, y, M, N, K, block, eps. N counts the
// weight's rows, for SwiGLU both halves. codes, x and norm start at multiples of 16 bytes; K is a multiple of 8; K * block
// is less than 2^32.
#pragma once

#include "../common/select.h"
#include "gemm.cuh"
#include "gemv.cuh"

namespace edge {

enum class Epilogue { none, residual, swiglu };

template <class Scale>
struct Linear {
    const __half *x, *norm;  // norm null: x as it is
    const int* codes;
    const Scale* scales;
    const int* zeros;
    const __half *bias, *residual;
    __half* y;
    int rows, outputs, columns, block;  // outputs: rows of the weight
    float eps;
};

/// silu(gate) * up. The exponential overflows to infinity for large negative gates, and the quotient is then zero.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

template <Epilogue E, class Scale>
__device__ __forceinline__ void finish(const Linear<Scale>& op, int m, int n, float sum) {
    if (n >= op.outputs) return;
    const long long at = (long long)(m)*op.outputs + n;
    sum += __half2float(op.bias[n]);
    if constexpr (E == Epilogue::residual) sum += __half2float(op.residual[at]);
    op.y[at] = __float2half_rn(sum);
}

template <class Scale>
__device__ __forceinline__ void finish_swiglu(const Linear<Scale>& op, int m, int n, float gate, float up) {
    const int outputs = op.outputs / 2;
    if (n >= outputs) return;
    gate += __half2float(op.bias[n]);
    up += __half2float(op.bias[outputs + n]);
    op.y[(long long)(m)*outputs + n] = __float2half_rn(swiglu(gate, up));
}

template <int Bits, int RunCodes, Epilogue E, class Scale>
__device__ __forceinline__ void gemv_runs(const Linear<Scale>& op, unsigned char* shared) {
    const Weight<Bits, Scale> weight(op.codes, op.scales, op.zeros, op.columns, op.block);
    const int pitch = (op.columns + 4 * RunCodes - 1) / (4 * RunCodes) * (4 * RunCodes);
    __half* const x = reinterpret_cast<__half*>(shared);
    float* const partial = reinterpret_cast<float*>(shared + (op.rows * pitch + 8) * 2);
    const int first = int(blockIdx.x * blockDim.y + threadIdx.y), stride = int(gridDim.x * blockDim.y);
    const auto prologue = [&] { stage_x<Bits>(x, partial, op.x, op.norm, op.rows, op.columns, pitch, op.eps); };
    if constexpr (E == Epilogue::swiglu) {
        const int outputs = op.outputs / 2;
        gemv_tiles<Bits, RunCodes>(weight, x, partial, op.rows, first, stride, (outputs + 7) / 8, GateUpRows{outputs},
                                   prologue, [&](int tile, int g, int m, float gate, float up) {
                                       finish_swiglu(op, m, tile * 8 + g, gate, up);
                                   });
    } else {
        gemv_tiles<Bits, RunCodes>(weight, x, partial, op.rows, first, stride, (op.outputs + TILE - 1) / TILE,
                                   PlainRows{op.outputs}, prologue, [&](int tile, int g, int m, float a, float b) {
                                       finish<E>(op, m, tile * TILE + g, a);
                                       finish<E>(op, m, tile * TILE + g + 8, b);
                                   });
    }
}

template <int Bits, Epilogue E, class Scale>
__device__ __forceinline__ void gemv(const Linear<Scale>& op, unsigned char* shared) {
    if constexpr (Bits == 4) {
        if (op.block != 16) return gemv_runs<4, 32, E>(op, shared);
    }
    gemv_runs<Bits, 16, E>(op, shared);
}

template <int Bits, Epilogue E, class Scale>
__device__ __forceinline__ void gemm(const Linear<Scale>& op, unsigned char* shared) {
    const Weight<Bits, Scale> weight(op.codes, op.scales, op.zeros, op.columns, op.block);
    if constexpr (E == Epilogue::swiglu) {
        // Of a warp's 32 columns the first 16 are gates, the others the same outputs' up.
        const int outputs = op.outputs / 2, tiles = (op.outputs + GEMM_N - 1) / GEMM_N;
        const auto rows_of = [&](int tile, int r) {
            const int n = tile * (GEMM_N / 2) + r / 32 * 16 + r % 16;
            return n < outputs ? n + r % 32 / 16 * outputs : -1;
        };
        gemm_tiles(weight, op.x, op.norm, op.eps, op.rows, tiles, shared, rows_of,
                   [&](int tile, int m, int warp_n, int column, const float(&d)[4][2]) {
#pragma unroll
                       for (int f = 0; f < 2; ++f)
#pragma unroll
                           for (int i = 0; i < 2; ++i)
                               finish_swiglu(op, m, tile * (GEMM_N / 2) + warp_n / 2 + 8 * f + column + i, d[f][i],
                                             d[f + 2][i]);
                   });
    } else {
        const auto rows_of = [&](int tile, int r) { return tile * GEMM_N + r < op.outputs ? tile * GEMM_N + r : -1; };
        gemm_tiles(weight, op.x, op.norm, op.eps, op.rows, (op.outputs + GEMM_N - 1) / GEMM_N, shared, rows_of,
                   [&](int tile, int m, int warp_n, int column, const float(&d)[4][2]) {
#pragma unroll
                       for (int f = 0; f < 4; ++f)
#pragma unroll
                           for (int i = 0; i < 2; ++i)
                               finish<E>(op, m, tile * GEMM_N + warp_n + 8 * f + column + i, d[f][i]);
                   });
    }
}

template <int Bits, Epilogue E, class Scale>
__device__ __forceinline__ void run_gemv(const Linear<Scale>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    gemv<Bits, E>(op, shared);
}

template <int Bits, Epilogue E, class Scale>
__device__ __forceinline__ void run_gemm(const Linear<Scale>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    gemm<Bits, E>(op, shared);
}

/// The launch gives 48 KiB to both. A GEMV whose x does not fit into them is done as a GEMM, and so are 4 bits in blocks
/// of 16, whose GEMV is a body of its own.
template <int Bits, Epilogue E, class Scale>
__device__ __forceinline__ void run_any(const Linear<Scale>& op) {
    EDGE_DYNAMIC_SHARED(shared);
    const int warps = int(blockDim.x * blockDim.y) / 32;
    const bool fits = gemv_shared(op.rows, op.columns, Bits, op.block, warps) <= ANY_SHARED;
    if (op.rows <= GEMV_ROWS && fits && (Bits == 8 || op.block != 16)) {
        gemv_runs<Bits, run_codes(Bits, 32), E>(op, shared);
    } else {
        gemm<Bits, E>(op, shared);
    }
}

}  // namespace edge

// --- entry points ---------------------------------------------------------------------------------------------------
// A block's threads, and blocks an SM: 16 warps of a GEMV at 128 registers a thread, 12 of the others at 168.
#define EDGE_BOUNDS_gemv edge::GEMV_THREADS
#define EDGE_BOUNDS_gemm edge::GEMM_THREADS, 3
#define EDGE_BOUNDS_any edge::GEMM_THREADS, 3

#define EDGE_LINEAR(kind, bits, Scale, format)                                                                        \
    EDGE_KERNEL(EDGE_BOUNDS_##kind)                                                                                   \
    void edge_linear_##format##_##kind(const __half* x, const int* codes, const Scale* scales, const int* zeros,      \
                                       const __half* bias, __half* y, int M, int N, int K, int block) {               \
        edge::run_##kind<bits, edge::Epilogue::none>(edge::Linear<Scale>{                                             \
            x, nullptr, codes, scales, zeros, bias, nullptr, y, M, N, K, block, 0.0f});                               \
    }                                                                                                                 \
    EDGE_ENTRY(edge_linear_##format##_##kind);

#define EDGE_LINEAR_RESIDUAL(kind, bits, Scale, format)                                                               \
    EDGE_KERNEL(EDGE_BOUNDS_##kind)                                                                                   \
    void edge_linear_residual_##format##_##kind(const __half* x, const int* codes, const Scale* scales,               \
                                                const int* zeros, const __half* bias, const __half* residual,         \
                                                __half* y, int M, int N, int K, int block) {                          \
        edge::run_##kind<bits, edge::Epilogue::residual>(edge::Linear<Scale>{                                         \
            x, nullptr, codes, scales, zeros, bias, residual, y, M, N, K, block, 0.0f});                              \
    }                                                                                                                 \
    EDGE_ENTRY(edge_linear_residual_##format##_##kind);

#define EDGE_NORM_LINEAR_AS(name, epilogue, kind, bits, Scale)                                                        \
    EDGE_KERNEL(EDGE_BOUNDS_##kind)                                                                                   \
    void name(const __half* x, const __half* norm, const int* codes, const Scale* scales, const int* zeros,           \
              const __half* bias, __half* y, int M, int N, int K, int block, float eps) {                             \
        edge::run_##kind<bits, edge::Epilogue::epilogue>(                                                             \
            edge::Linear<Scale>{x, norm, codes, scales, zeros, bias, nullptr, y, M, N, K, block, eps});               \
    }                                                                                                                 \
    EDGE_ENTRY(name);
#define EDGE_NORM_LINEAR(kind, bits, Scale, format)                                                                   \
    EDGE_NORM_LINEAR_AS(edge_norm_linear_##format##_##kind, none, kind, bits, Scale)
#define EDGE_NORM_LINEAR_SWIGLU(kind, bits, Scale, format)                                                            \
    EDGE_NORM_LINEAR_AS(edge_norm_linear_swiglu_##format##_##kind, swiglu, kind, bits, Scale)

#define EDGE_FORMATS(OP, kind)                                                                                        \
    EDGE_IF(EDGE_linear_w4_f16, OP(kind, 4, __half, w4_f16))                                                          \
    EDGE_IF(EDGE_linear_w4_f32, OP(kind, 4, float, w4_f32))                                                           \
    EDGE_IF(EDGE_linear_w8_f16, OP(kind, 8, __half, w8_f16))                                                          \
    EDGE_IF(EDGE_linear_w8_f32, OP(kind, 8, float, w8_f32))
#define EDGE_KINDS(OP)                                                                                                \
    EDGE_FORMATS(OP, gemv)                                                                                            \
    EDGE_FORMATS(OP, gemm)                                                                                            \
    EDGE_IF(EDGE_any, EDGE_FORMATS(OP, any))

EDGE_KINDS(EDGE_LINEAR)
EDGE_KINDS(EDGE_LINEAR_RESIDUAL)
EDGE_KINDS(EDGE_NORM_LINEAR)
EDGE_KINDS(EDGE_NORM_LINEAR_SWIGLU)
