// From an EdgeGroupNormSilu's shape to its launches.
#pragma once

#include "../common/launch.h"
#include "sizes.h"

/// size: the product of the dimensions behind the channels. workspace: 1 if the caller has edge_group_norm_workspace
/// bytes for the kernels; 0, as in ahead-of-time plugins: one launch in every case.
struct EdgeGroupNormShape {
    int batch, channels, groups, size, workspace, sms;
};

constexpr long long edge_group_norm_workspace(int batch, int groups) {
    return (long long)(batch)*groups * edge::NORM_PARTS * 2 * 4;
}

/// Threads of the block that has a group: as many as keep all of it in registers, in whole warps, up to 1024.
inline unsigned edge_group_norm_threads(long long packs) {
    const long long warps = (packs + 32 * edge::NORM_HELD - 1) / (32 * edge::NORM_HELD);
    return 32 * unsigned(warps < edge::NORM_THREADS / 32 ? warps : edge::NORM_THREADS / 32);
}

/// One or two launches, whose kernels then take `partial` too; 0 if no kernel takes the shape.
inline unsigned edge_plan_group_norm(const EdgeGroupNormShape& s, EdgeLaunch* out) {
    if (s.batch < 1 || s.groups < 1 || s.channels < 1 || s.channels % s.groups || s.size < 1 || s.sms < 1) return 0;
    const long long numbers = (long long)(s.channels / s.groups) * s.size, groups = (long long)(s.batch) * s.groups;
    if (numbers > 1 << 24 || groups > 65535) return 0;  // counts are float32
    const long long packs = s.size % 8 ? numbers : numbers / 8;

    // Parts of 1024 packs at least, four blocks for each multiprocessor, if there are fewer than two groups for each.
    long long parts = edge_parts(4 * s.sms, unsigned(groups));
    if (parts > packs / 1024) parts = packs / 1024;
    if (parts > edge::NORM_PARTS) parts = edge::NORM_PARTS;
    if (!s.workspace || groups >= 2 * s.sms || parts < 2) {
        *out = edge_launch("edge_group_norm", unsigned(groups), edge_group_norm_threads(packs), 0);
        return 1;
    }
    const char* const names[] = {"edge_group_norm_stats", "edge_group_norm_apply"};
    for (int i = 0; i < 2; ++i) {
        out[i] = edge_launch(names[i], unsigned(parts), edge::NORM_PART_THREADS, 0);
        out[i].grid[1] = unsigned(groups);
    }
    return 2;
}

EDGE_EXPORT_PLAN(group_norm, EdgeGroupNormShape)
