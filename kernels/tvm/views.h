// What every adapter needs: typed pointers of TVM's tensors, and a kernel's tasks on TVM's own threads.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>
#include <tvm/runtime/c_backend_api.h>

#include <cstdint>

// TVM's runtime exports it, but its package has no header for it: how many threads the caller's pool has.
namespace tvm::runtime::threading {
__attribute__((visibility("default"))) int NumThreads();
}

namespace edge {

using tvm::ffi::Optional;
using tvm::ffi::Shape;
using tvm::ffi::String;
using tvm::ffi::TensorView;

inline float* floats(const TensorView& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline const float* floats(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? floats(tensor.value()) : nullptr;
}

template <class T>
const T* data(const TensorView& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// Product of the dimensions from `first` on.
inline int64_t count(const TensorView& tensor, int first = 0) {
  int64_t total = 1;
  for (int i = first; i < tensor.ndim(); ++i) total *= tensor.size(i);
  return total;
}

inline int last_size(const TensorView& tensor) { return static_cast<int>(tensor.size(tensor.ndim() - 1)); }

// Rows of a tensor that is a matrix but for leading dimensions.
inline int rows(const TensorView& tensor) { return static_cast<int>(count(tensor) / last_size(tensor)); }

// Waking another thread costs as much as this many multiplications.
constexpr int64_t kWorthThreads = 1 << 17;

// kernel(task, tasks) for every task: on TVM's threads where there is enough `work` (multiplications), else here. TVM's
// launch asks the system for the number of processors each time, which takes longer than a small convolution.
template <class Kernel>
void launch(int64_t work, Kernel kernel) {
  if (work < kWorthThreads || tvm::runtime::threading::NumThreads() == 1) {
    kernel(0, 1);
    return;
  }
  const auto run = [](int task, TVMParallelGroupEnv* group, void* data) {
    (*static_cast<Kernel*>(data))(task, group->num_task);
    return 0;
  };
  if (TVMBackendParallelLaunch(run, &kernel, 0) != 0) kernel(0, 1);
}

}  // namespace edge
