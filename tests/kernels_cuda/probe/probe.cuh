// Small kernels that show what cuda_on_cpu.h does; from probe_divergent on they are wrong on purpose.
#pragma once
#include "common/device.cuh"

/// y[block] = the sum of the block's x, by shared memory and by shuffles; the two must agree.
EDGE_KERNEL(256) void probe_sum(const float* x, float* y, int n) {
    __shared__ float scratch[32], all[256];
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    const float mine = i < n ? x[i] : 0.0f;
    all[threadIdx.x] = mine;
    const float sum = edge::block_sum(mine, scratch);
    float again = 0;
    for (unsigned j = 0; j < blockDim.x; ++j) again += all[j];
    if (threadIdx.x == 0) y[blockIdx.x] = sum == again ? sum : edge::infinity();
}
EDGE_ENTRY(probe_sum);

/// y[16][8] = a[16][16] b[8][16]^T on the tensor cores, a and b through shared memory by asynchronous copies.
EDGE_KERNEL(32) void probe_mma(const __half* a, const __half* b, float* y) {
    EDGE_DYNAMIC_SHARED(bytes);
    __half* left = reinterpret_cast<__half*>(bytes);
    __half* right = left + 256;
    const unsigned lane = edge::lane();
    edge::copy_async(left + lane * 8, a + lane * 8);
    if (lane < 16) edge::copy_async(right + lane * 8, b + lane * 8);
    edge::copy_commit();
    edge::copy_wait<0>();
    __syncthreads();
    unsigned l[4], r[4];
    edge::load_matrices(l, left + lane % 16 * 16 + lane / 16 * 8);
    edge::load_matrices(r, right + lane % 8 * 16 + lane / 8 % 2 * 8);
    float d[4] = {};
    edge::mma(d, l, r[0], r[1]);
    for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
EDGE_ENTRY(probe_mma);

EDGE_KERNEL(32) void probe_round(const float* x, __half* y, int n) {
    for (int i = int(threadIdx.x); i < n; i += 32) y[i] = __float2half(x[i]);
}
EDGE_ENTRY(probe_round);

EDGE_KERNEL(64) void probe_divergent(float* y) {
    if (threadIdx.x < 40) __syncthreads();
    y[threadIdx.x] = 1;
}
EDGE_ENTRY(probe_divergent);

EDGE_KERNEL(64) void probe_unpaired(float* y) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}
EDGE_ENTRY(probe_unpaired);

EDGE_KERNEL(32) void probe_stray_lane(float* y) {
    if (threadIdx.x < 8) y[threadIdx.x] = __shfl_sync(0xffu, float(threadIdx.x), int(threadIdx.x) + 4);
}
EDGE_ENTRY(probe_stray_lane);

EDGE_KERNEL(32) void probe_beyond(float* y) {
    EDGE_DYNAMIC_SHARED(bytes);
    float* shared = reinterpret_cast<float*>(bytes);
    shared[threadIdx.x] = 1;
    y[threadIdx.x] = shared[threadIdx.x];
}
EDGE_ENTRY(probe_beyond);
