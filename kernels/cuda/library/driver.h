// The dozen functions of CUDA's driver that a launch needs, from libcuda.so.1 at run time; declared here, so that
// neither cuda.h nor any library of CUDA's is needed to build this.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/launch.h"

namespace edge {

/// What went wrong; `code` is one of edge_kernels.h.
struct DriverFault {
    int code;
    std::string message;
};

/// The PTX file that the kernels come from. Raises DriverFault if it cannot be read, or another is in use already.
void set_kernels(const std::string& path);

/// Multiprocessors of the current context's device.
int multiprocessors();

/// Finds (and, the first time in a context, compiles) a kernel: beforehand, since a stream that is being captured into
/// a CUDA graph must not.
void prepare_kernel(const EdgeLaunch& launch);

/// Launches a kernel; `arguments` points to each argument's value.
void launch_kernel(const EdgeLaunch& launch, void** arguments, void* stream);

void copy_on_device(void* to, const void* from, uint64_t bytes, void* stream);

}  // namespace edge
