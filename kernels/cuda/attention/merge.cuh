// EdgeAttentionMerge: what the splits of a decode step saw of the cache, or a prefill's rows, become the output.
#pragma once

#include "../common/device.cuh"
#include "sizes.h"

namespace edge {

/// Blocks are (head, token, row of the batch); out is [B, S, H, D], partial [B, H, P, D + 2]. Warps share the splits.
__device__ __forceinline__ void merge(const float* partial, __half* out, int tokens, int heads, int head_dim,
                                      int rows) {
    __shared__ float2 sums[MERGE_THREADS / 32][32];
    __shared__ float totals[MERGE_THREADS / 32];
    const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32;
    const int head = int(blockIdx.x), s = int(blockIdx.y), b = int(blockIdx.z);
    const float* const all = partial + ((long long)(b)*heads + head) * rows * (head_dim + 2);
    // One token: every row is a split of its cache. Several: a row each.
    const int first = tokens == 1 ? 0 : s, end = tokens == 1 ? rows : s + 1;
    float m = -infinity();
    for (int p = first + int(lane()); p < end; p += 32) m = fmaxf(m, all[p * (head_dim + 2) + head_dim]);
    m = warp_max(m);

    __half* const row = out + (((long long)(b)*tokens + s) * heads + head) * head_dim;
    for (int d = 0; d < head_dim; d += 64) {  // pairs of dims over the lanes
        const int mine = d + 2 * int(lane());
        float2 sum = {0, 0};
        float total = 0;
#pragma unroll 4
        for (int p = first + warp; p < end; p += warps) {
            const float* const part = all + p * (head_dim + 2);
            const float factor = part[head_dim] == -infinity() ? 0.0f : __expf(part[head_dim] - m);
            total += factor * part[head_dim + 1];
            if (mine < head_dim) {
                const float2 pair = *reinterpret_cast<const float2*>(part + mine);
                sum.x += factor * pair.x;
                sum.y += factor * pair.y;
            }
        }
        sums[warp][lane()] = sum;
        if (lane() == 0) totals[warp] = total;
        __syncthreads();
        if (warp == 0 && mine < head_dim) {
            for (int w = 1; w < warps; ++w) {
                sum.x += sums[w][lane()].x;
                sum.y += sums[w][lane()].y;
                total += totals[w];
            }
            const float scale = total == 0 ? 0.0f : 1.0f / total;  // a token before position 0 sees nothing
            *reinterpret_cast<__half2*>(row + mine) = __floats2half2_rn(sum.x * scale, sum.y * scale);
        }
        __syncthreads();
    }
}

}  // namespace edge
