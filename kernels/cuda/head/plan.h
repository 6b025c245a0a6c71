// From an EdgeHead's and an EdgeMergeTop's shape to their launches.
#pragma once

#include <cstdio>

#include "../common/launch.h"
#include "sizes.h"

struct EdgeHeadShape {
    int bits, scale_f32, B, V, K, block, k, sms;
};

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_head(const EdgeHeadShape& s, EdgeLaunch* out) {
    if ((s.bits != 4 && s.bits != 8) || s.B < 1 || s.V < 1 || s.K < 1 || s.K % 8 || s.k < 1 || s.k > edge::HEAD_TOP) return 0;
    if (s.block < 16 || (s.block != 16 && s.block % 32) || (long long)(s.K) * s.block >= 1ll << 32) return 0;
    const int rows = s.B < edge::GEMV_ROWS ? s.B : edge::GEMV_ROWS;
    const unsigned shared = edge::head_shared(rows, s.K, s.bits, s.block);
    if (shared > EDGE_SHARED_LARGEST) return 0;
    char name[96];
    std::snprintf(name, sizeof name, "edge_head_w%d_%s", s.bits, s.scale_f32 ? "f32" : "f16");
    *out = edge_launch(name, edge_parts(s.V, edge::HEAD_TILE), 32, shared);
    out->grid[1] = edge_parts(s.B, edge::GEMV_ROWS);
    out->block[1] = edge::HEAD_WARPS;
    return 1;
}

EDGE_EXPORT_PLAN(head, EdgeHeadShape)

struct EdgeMergeTopShape {
    int B, tiles, k, sms;
};

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_merge_top(const EdgeMergeTopShape& s, EdgeLaunch* out) {
    if (s.B < 1 || s.tiles < 1 || s.k < 1 || s.k > edge::HEAD_TOP) return 0;
    *out = edge_launch("edge_merge_top", s.B, edge::MERGE_WARPS * 32, 0);
    return 1;
}

EDGE_EXPORT_PLAN(merge_top, EdgeMergeTopShape)
