/* The functions of CUDA's driver that runtimes/cuda_driver.py calls, over the host's memory and with the prototypes of
 * the real cuda.h: what Python hands over must arrive. Work is done at once; what is left at the end is counted. */
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

static long retained, pushed, blocks, pinned, streams, graphs;
static size_t limit = 1 << 20;
static int current, capturing;

long edge_left(void) { return retained + pushed + blocks + pinned + streams + graphs; }
long edge_pinned(void) { return pinned; }
int edge_current(void) { return current; }

#define CONTEXT ((CUcontext)0x1000)
#define STREAM ((CUstream)0x2000)
#define REFUSE_UNLESS(condition) if (!(condition)) return CUDA_ERROR_INVALID_VALUE

CUresult cuInit(unsigned flags) {
    REFUSE_UNLESS(flags == 0);
    return getenv("EDGE_NO_GPU") ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) { REFUSE_UNLESS(ordinal == 0); *device = 7; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    REFUSE_UNLESS(device == 7);
    retained++;
    *context = CONTEXT;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { REFUSE_UNLESS(device == 7); retained--; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { REFUSE_UNLESS(context == CONTEXT); current++; return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { REFUSE_UNLESS(context == CONTEXT); pushed++; return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { pushed--; *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    REFUSE_UNLESS(device == 7);
    strncpy(name, "Orin", length);
    return CUDA_SUCCESS;
}
#undef cuDeviceGetUuid /* 13 has it for the second version, 12 for the first */
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    REFUSE_UNLESS(device == 7);
    for (int i = 0; i < 16; i++) uuid->bytes[i] = (char)(0xf0 + i);
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { *version = 12060; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    const char *capability = getenv("EDGE_SM");
    int number = atoi(capability ? capability : "87");
    REFUSE_UNLESS(device == 7);
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? number / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? number % 10 : -1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "other";
    return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    REFUSE_UNLESS(flags == CU_STREAM_NON_BLOCKING);
    streams++;
    *stream = STREAM;
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream stream) { REFUSE_UNLESS(stream == STREAM); streams--; return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream stream) { REFUSE_UNLESS(stream == STREAM && !capturing); return CUDA_SUCCESS; }

static CUresult take(void **pointer, size_t size, long *count) {
    if (size > limit) return CUDA_ERROR_OUT_OF_MEMORY;
    (*count)++;
    *pointer = malloc(size);
    memset(*pointer, 0xa5, size);
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) { return take((void **)pointer, size, &blocks); }
CUresult cuMemFree(CUdeviceptr pointer) { blocks--; free((void *)pointer); return CUDA_SUCCESS; }
CUresult cuMemAllocHost(void **pointer, size_t size) { return take(pointer, size, &pinned); }
CUresult cuMemFreeHost(void *pointer) { REFUSE_UNLESS(pushed == 1); pinned--; free(pointer); return CUDA_SUCCESS; }
CUresult cuMemsetD8Async(CUdeviceptr pointer, unsigned char value, size_t size, CUstream stream) {
    REFUSE_UNLESS(stream == STREAM);
    memset((void *)pointer, value, size);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    REFUSE_UNLESS(stream == STREAM);
    memcpy((void *)target, source, size);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    REFUSE_UNLESS(stream == STREAM);
    memcpy(target, (void *)source, size);
    return CUDA_SUCCESS;
}
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D *copy, CUstream stream) {
    REFUSE_UNLESS(stream == STREAM);
    REFUSE_UNLESS(copy->srcMemoryType == CU_MEMORYTYPE_DEVICE && copy->dstMemoryType == CU_MEMORYTYPE_DEVICE);
    REFUSE_UNLESS(!copy->srcXInBytes && !copy->srcY && !copy->dstXInBytes && !copy->dstY);
    REFUSE_UNLESS(copy->WidthInBytes <= copy->srcPitch && copy->WidthInBytes <= copy->dstPitch);
    for (size_t row = 0; row < copy->Height; row++)
        memcpy((char *)copy->dstDevice + row * copy->dstPitch,
               (char *)copy->srcDevice + row * copy->srcPitch, copy->WidthInBytes);
    return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    REFUSE_UNLESS(stream == STREAM && mode == CU_STREAM_CAPTURE_MODE_RELAXED);
    capturing = 1;
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    REFUSE_UNLESS(stream == STREAM && capturing);
    capturing = 0;
    graphs++;
    *graph = (CUgraph)0x3000;
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    REFUSE_UNLESS(graph == (CUgraph)0x3000 && flags == 0);
    graphs++;
    *executable = (CUgraphExec)0x4000;
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) { REFUSE_UNLESS(graph == (CUgraph)0x3000); graphs--; return CUDA_SUCCESS; }
CUresult cuGraphExecDestroy(CUgraphExec executable) {
    REFUSE_UNLESS(executable == (CUgraphExec)0x4000);
    graphs--;
    return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    REFUSE_UNLESS(executable == (CUgraphExec)0x4000 && stream == STREAM);
    return CUDA_SUCCESS;
}
