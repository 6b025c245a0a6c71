// From an EdgeBiasActivation's shape to its launch.
#pragma once

#include "../common/launch.h"
#include "sizes.h"

/// size: the product of the dimensions behind the channels. activation: 1 silu, 2 snake.
struct EdgeBiasActivationShape {
    int batch, channels, size, activation, sms;
};

/// One launch; 0 if no kernel takes the shape.
inline unsigned edge_plan_bias_activation(const EdgeBiasActivationShape& s, EdgeLaunch* out) {
    if (s.batch < 1 || s.channels < 1 || s.size < 1 || s.activation < 1 || s.activation > 2) return 0;
    const bool vectors = s.size % 8 == 0;
    const long long items = (long long)(s.batch) * s.channels * (vectors ? s.size / 8 : s.size);
    if (items >= 1ll << 31) return 0;
    *out = edge_launch("edge_bias_activation",
                       edge_parts(unsigned(items), edge::ACTIVATION_THREADS * edge::ACTIVATION_VECTORS),
                       edge::ACTIVATION_THREADS, 0);
    return 1;
}

EDGE_EXPORT_PLAN(bias_activation, EdgeBiasActivationShape)
