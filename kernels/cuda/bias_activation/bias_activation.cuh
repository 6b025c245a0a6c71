// EdgeBiasActivation: y = act(x + bias[c]) over x [B, C, N], in float32: silu, or snake z + sin(z)^2.
//
// Entry point: edge_bias_activation. Arguments: x, bias, y, rows (B * C), channels, size (N), activation (1 silu,
// 2 snake). A thread moves 16 bytes at a time where N is a multiple of 8, one number where it is not.
#pragma once

#include "../common/device.cuh"
#include "sizes.h"

namespace edge {

/// sin(z)^2, whose period is pi: after z - k pi, by a product in two parts, __sinf is off by 2^-21 at most (CUDA guide,
/// intrinsic functions: 2^-21.41 between -pi and pi), whatever the size of z (k below 2^16).
__device__ __forceinline__ float sine_squared(float z) {
    constexpr float OVER_PI = 0.318309886f, PI_HIGH = 3.14159274f, PI_LOW = -8.74227766e-8f;
    const float k = rintf(z * OVER_PI);
    const float sine = __sinf(fmaf(-k, PI_LOW, fmaf(-k, PI_HIGH, z)));
    return sine * sine;
}

/// For z far below zero the exponential is infinite and the quotient zero.
__device__ __forceinline__ float activated(float z, int activation) {
    return activation == 1 ? z / (1.0f + __expf(-z)) : z + sine_squared(z);
}

__device__ __forceinline__ unsigned activated2(unsigned pair, float bias, int activation) {
    const float2 x = __half22float2(as_half2(pair));
    return as_bits(__floats2half2_rn(activated(x.x + bias, activation), activated(x.y + bias, activation)));
}

/// A block works on consecutive vectors of all rows; what one thread loads is a block apart.
__device__ __forceinline__ void bias_activation_vectors(const __half* x, const __half* bias, __half* y, int rows,
                                                        int channels, int size, int activation) {
    const unsigned a_row = unsigned(size) / 8, end = unsigned(rows) * a_row;
    const unsigned first = blockIdx.x * (ACTIVATION_THREADS * ACTIVATION_VECTORS) + threadIdx.x;
    uint4 v[ACTIVATION_VECTORS];
#pragma unroll
    for (int i = 0; i < ACTIVATION_VECTORS; ++i) {
        const unsigned at = first + unsigned(i) * ACTIVATION_THREADS;
        if (at < end) v[i] = load_once(x + 8ull * at);
    }
#pragma unroll
    for (int i = 0; i < ACTIVATION_VECTORS; ++i) {
        const unsigned at = first + unsigned(i) * ACTIVATION_THREADS;
        if (at >= end) continue;
        const float b = __half2float(bias[at / a_row % unsigned(channels)]);
        store16(y + 8ull * at, make_uint4(activated2(v[i].x, b, activation), activated2(v[i].y, b, activation),
                                          activated2(v[i].z, b, activation), activated2(v[i].w, b, activation)));
    }
}

__device__ __forceinline__ void bias_activation_scalars(const __half* x, const __half* bias, __half* y, int rows,
                                                        int channels, int size, int activation) {
    const unsigned end = unsigned(rows) * unsigned(size);
    const unsigned first = blockIdx.x * (ACTIVATION_THREADS * ACTIVATION_VECTORS) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < ACTIVATION_VECTORS; ++i) {
        const unsigned at = first + unsigned(i) * ACTIVATION_THREADS;
        if (at >= end) continue;
        const float b = __half2float(bias[at / unsigned(size) % unsigned(channels)]);
        y[at] = __float2half_rn(activated(__half2float(x[at]) + b, activation));
    }
}

}  // namespace edge

EDGE_KERNEL(edge::ACTIVATION_THREADS)
void edge_bias_activation(const __half* x, const __half* bias, __half* y, int rows, int channels, int size,
                          int activation) {
    if (size % 8 == 0) {
        edge::bias_activation_vectors(x, bias, y, rows, channels, size, activation);
    } else {
        edge::bias_activation_scalars(x, bias, y, rows, channels, size, activation);
    }
}
EDGE_ENTRY(edge_bias_activation);
