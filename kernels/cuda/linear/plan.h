// From an EdgeLinear's shape to its launch.
#pragma once

#include <cstdio>

#include "../common/launch.h"
#include "sizes.h"

/// op: 0 linear, 1 linear_residual, 2 norm_linear, 3 norm_linear_swiglu. kind: 0 the faster of gemv and gemm for M, 1
/// the kernel that branches on M. N counts the weight's rows. sms: multiprocessors of the device.
struct EdgeLinearShape {
    int op, bits, scale_f32, M, N, K, block, kind, sms;
};

/// Warps that share a tile's columns: the fewest that give each SM 16 warps, as many as the columns have steps at most.
inline int edge_gemv_splits(int tiles, int K, int bits, int block, int sms, int most) {
    const int steps = edge::padded_columns(K, bits, block) / (4 * edge::run_codes(bits, block));
    int splits = 1;
    while (splits * 2 <= most && splits < steps && tiles * splits < 16 * sms) splits *= 2;
    return splits;
}

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_linear(const EdgeLinearShape& s, EdgeLaunch* out) {
    static const char* const OPS[] = {"linear", "linear_residual", "norm_linear", "norm_linear_swiglu"};
    if (s.op < 0 || s.op > 3 || (s.bits != 4 && s.bits != 8) || s.M < 1 || s.N < 1 || s.K < 1 || s.K % 8 || s.sms < 1) return 0;
    if (s.block < 16 || (s.block != 16 && s.block % 32) || (long long)(s.K) * s.block >= 1ll << 32) return 0;
    const bool swiglu = s.op == 3;
    if (swiglu && s.N % 2) return 0;

    const int tiles = swiglu ? (s.N / 2 + 7) / 8 : (s.N + edge::TILE - 1) / edge::TILE;
    const int any = s.kind == 1;
    const int splits = edge_gemv_splits(tiles, s.K, s.bits, s.block, s.sms, any ? 4 : 16);
    const int warps = splits < 4 ? 4 : splits, together = warps / splits;  // tiles that a block works on at a time
    const unsigned gemv_shared = edge::gemv_shared(s.M, s.K, s.bits, s.block, warps);
    const bool gemv = s.M <= edge::GEMV_ROWS && gemv_shared <= (any ? EDGE_SHARED_DEFAULT : EDGE_SHARED_LARGEST);
    // More than one wave of blocks would normalise x anew for each: the grid strides instead.
    unsigned blocks = edge_parts(tiles, together);
    const unsigned wave = unsigned(s.sms) * (any ? 3 : 16 / warps);
    if (blocks > wave) blocks = wave;
    if (!gemv) blocks = edge_parts(s.M, edge::GEMM_M) * edge_parts(s.N, edge::GEMM_N);

    char name[96];
    std::snprintf(name, sizeof name, "edge_%s_w%d_%s_%s", OPS[s.op], s.bits, s.scale_f32 ? "f32" : "f16",
                  any ? "any" : gemv ? "gemv" : "gemm");
    *out = edge_launch(name, blocks, edge::GEMM_THREADS, any ? EDGE_SHARED_DEFAULT : edge::GEMM_SHARED);
    if (gemv || any) {
        out->block[0] = 32 * splits;
        out->block[1] = together;
    }
    if (gemv && !any) out->shared_bytes = gemv_shared;
    return 1;
}

EDGE_EXPORT_PLAN(linear, EdgeLinearShape)
