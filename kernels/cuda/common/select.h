// Which entry points a build instantiates. All; or with EDGE_ONLY defined, those whose flags are defined as 1:
// -DEDGE_ONLY -DEDGE_linear_w4_f16=1 -DEDGE_head_w8_f16=1 -DEDGE_d64=1. A bundle calls few of them, and each takes a
// second to compile. Flags: weight formats of linear and head, head widths of attention, its int8 cache, and `any`, the
// kernels whose launch does not depend on the number of rows.
#pragma once

#ifdef EDGE_ONLY
#define EDGE_REST 0
#else
#define EDGE_REST 1
#endif

#ifndef EDGE_linear_w4_f16
#define EDGE_linear_w4_f16 EDGE_REST
#endif
#ifndef EDGE_linear_w4_f32
#define EDGE_linear_w4_f32 EDGE_REST
#endif
#ifndef EDGE_linear_w8_f16
#define EDGE_linear_w8_f16 EDGE_REST
#endif
#ifndef EDGE_linear_w8_f32
#define EDGE_linear_w8_f32 EDGE_REST
#endif
#ifndef EDGE_head_w4_f16
#define EDGE_head_w4_f16 EDGE_REST
#endif
#ifndef EDGE_head_w4_f32
#define EDGE_head_w4_f32 EDGE_REST
#endif
#ifndef EDGE_head_w8_f16
#define EDGE_head_w8_f16 EDGE_REST
#endif
#ifndef EDGE_head_w8_f32
#define EDGE_head_w8_f32 EDGE_REST
#endif
#ifndef EDGE_d64
#define EDGE_d64 EDGE_REST
#endif
#ifndef EDGE_d128
#define EDGE_d128 EDGE_REST
#endif
#ifndef EDGE_d256
#define EDGE_d256 EDGE_REST
#endif
#ifndef EDGE_i8
#define EDGE_i8 EDGE_REST
#endif
#ifndef EDGE_any
#define EDGE_any EDGE_REST
#endif

/// What follows, where the flag is 1.
#define EDGE_IF(flag, ...) EDGE_IF_VALUE(flag, __VA_ARGS__)
#define EDGE_IF_VALUE(value, ...) EDGE_IF_##value(__VA_ARGS__)
#define EDGE_IF_0(...)
#define EDGE_IF_1(...) __VA_ARGS__
