// The CUDA kernels as a C library, for tools, tests and programs without TensorRT: one function runs any op of ops.txt.
//
// Nothing of CUDA is linked: the driver (libcuda.so.1) is opened when a kernel is first run, and kernels come from a
// PTX file, so one library serves every GPU. Every function but edge_message returns EDGE_OK or says why not;
// edge_message then gives the sentence, of the calling thread's last failure.
#pragma once

#include <stdint.h>

#include "../common/launch.h"

#define EDGE_API extern "C" __attribute__((visibility("default")))

enum {
    EDGE_OK = 0,
    EDGE_REFUSED,     // inputs, outputs or attributes are not what the op takes
    EDGE_NO_DRIVER,   // no libcuda.so.1, or one that lacks a function
    EDGE_NO_KERNELS,  // no PTX file, or the driver refuses it, or it has no such kernel
    EDGE_CUDA,        // a call to CUDA failed
    EDGE_BROKEN,      // a fault of ours
};

enum { EDGE_F32 = 0, EDGE_F16 = 1, EDGE_I8 = 2, EDGE_I32 = 3 };  // TensorRT's numbers

enum { EDGE_MAX_RANK = 8, EDGE_MAX_TENSORS = 16, EDGE_MAX_LAUNCHES = 4 };

/// A dense row-major tensor; `data` is on the device. A dimension of -1 is not known yet (edge_outputs alone takes it).
struct EdgeTensor {
    int32_t type, rank;
    int64_t dims[EDGE_MAX_RANK];
    void* data;
};

struct EdgeAttribute {
    const char* name;
    double value;  // of an int or a float attribute, exactly
};

/// The last failure of this thread, "" if there was none.
EDGE_API const char* edge_message(void);

/// "edge-build:" and what this library was built of and for, if its builder said so (runtimes/tensorrt_plugins.py).
EDGE_API const char* edge_build(void);

/// The name of the i-th op, or null.
EDGE_API const char* edge_op(int i);

/// Which PTX file the kernels come from. Without a call: `edge_kernels.ptx` beside this library. Before the first run.
EDGE_API int edge_set_kernels(const char* path);

/// Types and shapes of the outputs, into `outputs` (room for EDGE_MAX_TENSORS); checks everything that is known.
EDGE_API int edge_outputs(const char* op, const EdgeAttribute* attributes, int attribute_count,
                          const EdgeTensor* inputs, int input_count, EdgeTensor* outputs, int* output_count);

/// Bytes of the scratch buffer that makes the op faster for these inputs, 0 where none does.
EDGE_API int edge_workspace(const char* op, const EdgeAttribute* attributes, int attribute_count,
                            const EdgeTensor* inputs, int input_count, uint64_t* bytes);

/// The launches of an op on a device with `sms` multiprocessors, into `launches` (room for EDGE_MAX_LAUNCHES), with its
/// workspace (1) or without.
EDGE_API int edge_plan(const char* op, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
                       int input_count, int sms, int workspace, EdgeLaunch* launches, int* launch_count);

/// Runs an op in `stream` (a CUstream) of the current context. Where an output is `like` an input and has memory of its
/// own, the input is copied into it first. `workspace`: of edge_workspace's bytes, or null.
EDGE_API int edge_run(const char* op, const EdgeAttribute* attributes, int attribute_count, const EdgeTensor* inputs,
                      int input_count, const EdgeTensor* outputs, int output_count, void* workspace, void* stream);
