// What every plan.h fills in: one launch of one kernel. Plain C++17, no CUDA headers: plans run in the plugin, in tests
// and in the benchmark alike, so what is tested and timed is what ships.
#pragma once

#include <cstdio>

/// One launch: the entry point's unmangled name, the grid and block, and the dynamic shared memory in bytes.
struct EdgeLaunch {
    char kernel[96];
    unsigned grid[3], block[3], shared_bytes;
};

/// Dynamic shared memory that every device gives without being asked; above it the launcher raises the kernel's limit
/// (cuFuncSetAttribute), which sm_89 and sm_120 allow up to 99 KiB.
constexpr unsigned EDGE_SHARED_DEFAULT = 48 * 1024;
constexpr unsigned EDGE_SHARED_LARGEST = 99 * 1024;

/// `count` things in parts of `size`, the last one short.
constexpr unsigned edge_parts(unsigned count, unsigned size) { return (count + size - 1) / size; }

/// A launch along x alone.
inline EdgeLaunch edge_launch(const char* kernel, unsigned blocks, unsigned threads, unsigned shared_bytes) {
    EdgeLaunch launch{{}, {blocks, 1, 1}, {threads, 1, 1}, shared_bytes};
    std::snprintf(launch.kernel, sizeof launch.kernel, "%s", kernel);
    return launch;
}

// A plan.h ends with EDGE_EXPORT_PLAN(name, Shape) for
//     inline unsigned edge_plan_<name>(const Shape&, EdgeLaunch*);   // number of launches; 0: no kernel takes the shape
// where Shape holds ints (and floats) alone; Python then calls it as edge_export_plan_<name>.
#ifdef EDGE_EXPORT_PLANS
#define EDGE_EXPORT_PLAN(name, Shape)                                                   \
    extern "C" unsigned edge_export_plan_##name(const Shape* shape, EdgeLaunch* out) { \
        return edge_plan_##name(*shape, out);                                           \
    }
#else
#define EDGE_EXPORT_PLAN(name, Shape)
#endif
