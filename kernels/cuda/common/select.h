// Which entry points a build instantiates. All, or with EDGE_ONLY those whose weight format and kind are named:
// -DEDGE_ONLY -DEDGE_w4_f16 -DEDGE_gemv -DEDGE_gemm. A bundle needs a few of them, and each takes a second to compile.
#pragma once

#if !defined(EDGE_ONLY) || defined(EDGE_w4_f16)
#define EDGE_IF_w4_f16(...) __VA_ARGS__
#else
#define EDGE_IF_w4_f16(...)
#endif
#if !defined(EDGE_ONLY) || defined(EDGE_w4_f32)
#define EDGE_IF_w4_f32(...) __VA_ARGS__
#else
#define EDGE_IF_w4_f32(...)
#endif
#if !defined(EDGE_ONLY) || defined(EDGE_w8_f16)
#define EDGE_IF_w8_f16(...) __VA_ARGS__
#else
#define EDGE_IF_w8_f16(...)
#endif
#if !defined(EDGE_ONLY) || defined(EDGE_w8_f32)
#define EDGE_IF_w8_f32(...) __VA_ARGS__
#else
#define EDGE_IF_w8_f32(...)
#endif
#if !defined(EDGE_ONLY) || defined(EDGE_any)
#define EDGE_IF_any(...) __VA_ARGS__
#else
#define EDGE_IF_any(...)
#endif
