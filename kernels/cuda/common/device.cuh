// What the kernels share: one vocabulary for nvcc, NVRTC and, through cuda_on_cpu.h, g++.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define EDGE_ENTRY(name)
#define EDGE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_on_cpu.h"
#endif

// Entry points: EDGE_KERNEL(threads[, blocks an SM at least]) void edge_op_variant(...) {...} and, after it, EDGE_ENTRY(edge_op_variant), which
// the CPU build needs to call it by name. Dynamic shared memory: EDGE_DYNAMIC_SHARED(bytes); inside the kernel.
#define EDGE_KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__)

namespace edge {

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ unsigned lane() { return threadIdx.x % 32; }

// --- bits and halves ------------------------------------------------------------------------------------------------
__device__ __forceinline__ __half2 as_half2(unsigned bits) {
    __half2 value;
    memcpy(&value, &bits, 4);
    return value;
}

__device__ __forceinline__ unsigned as_bits(__half2 value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

/// (x & mask) | bits in one instruction.
__device__ __forceinline__ unsigned and_or(unsigned x, unsigned mask, unsigned bits) {
#ifdef __CUDA_ARCH__
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
#else
    return (x & mask) | bits;
#endif
}

// --- memory ---------------------------------------------------------------------------------------------------------
/// 16 bytes that are read once: past the L1, which keeps what is read again. `p` is a multiple of 16.
__device__ __forceinline__ uint4 load_once(const void* p) {
#ifdef __CUDA_ARCH__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    return edge_cpu::load<uint4>(p);
#endif
}

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

/// Starts copying 16 bytes from global to shared memory, both multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global) : "memory");
#else
    edge_cpu::copy_async(shared, global);
#endif
}

/// Closes the group of copies that this thread started since the last call.
__device__ __forceinline__ void copy_commit() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    edge_cpu::copy_commit();
#endif
}

/// Waits until at most `Pending` of this thread's groups are under way; __syncthreads then shows them to the others.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
    edge_cpu::copy_wait(Pending);
#endif
}

// --- reductions -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

/// The sum over a block of whole warps, in every thread; `scratch` is 32 floats of shared memory, free afterwards.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane() == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_sum(lane() < blockDim.x / 32 ? scratch[lane()] : 0.0f);
    __syncthreads();
    return x;
}

// --- tensor cores ---------------------------------------------------------------------------------------------------
/// d += a b: a is 16 x 16 (4 registers of 2 halves), b is 16 x 8 (2 registers), d is 16 x 8 in float32. With
/// g = lane / 4 and t = lane % 4: a = {(g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)}, b = {(2t, g), (2t+8, g)}, each with
/// its right or lower neighbour; d = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)} (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    edge_cpu::mma(d, a, b0, b1);
#endif
}

/// Four 8 x 8 matrices of halves from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, a
/// multiple of 16) and receives of each matrix the pair (lane / 4, 2 (lane % 4)).
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
#ifdef __CUDA_ARCH__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
#else
    edge_cpu::load_matrices(r, row);
#endif
}

}  // namespace edge
