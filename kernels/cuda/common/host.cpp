// One op's kernels as a shared library for the CPU: compiled with EDGE_SOURCE (and, where there is one, EDGE_PLAN), the
// paths of the op's .cuh and plan.h relative to kernels/cuda.
#define EDGE_EXPORT_PLANS
#include EDGE_SOURCE
#ifdef EDGE_PLAN
#include EDGE_PLAN
#endif

/// Runs the entry point that the plan names, with cuLaunchKernel's array of pointers to arguments; 1 if there is none.
extern "C" int edge_cpu_launch(const EdgeLaunch* plan, void** arguments) {
    const auto found = edge_cpu::entries().find(plan->kernel);
    if (found == edge_cpu::entries().end()) return 1;
    found->second(*plan, arguments);
    return 0;
}

/// The name of the i-th entry point, or null.
extern "C" const char* edge_cpu_entry(int i) {
    auto at = edge_cpu::entries().begin();
    for (; i > 0 && at != edge_cpu::entries().end(); --i) ++at;
    return at == edge_cpu::entries().end() ? nullptr : at->first.c_str();
}
