// TVM's calls of norms and activations.
#include "../cpu/edge_kernels.h"
#include "views.h"

namespace edge {
namespace {

// A norm or activation does about this much work per value.
constexpr int64_t kPerValue = 8;

void RmsNorm(TensorView x, TensorView weight, double eps, String, TensorView y) {
  launch(count(x) * kPerValue, [&](int task, int tasks) {
    rms_norm(floats(x), floats(weight), static_cast<float>(eps), floats(y), rows(x), last_size(x), task, tasks);
  });
}

void AddRmsNorm(TensorView x, TensorView residual, TensorView weight, double eps, String, TensorView y,
                TensorView total) {
  launch(count(x) * kPerValue, [&](int task, int tasks) {
    add_rms_norm(floats(x), floats(residual), floats(weight), static_cast<float>(eps), floats(y), floats(total),
                 rows(x), last_size(x), task, tasks);
  });
}

void Swiglu(TensorView joined, String, TensorView y) {
  launch(count(y) * kPerValue, [&](int task, int tasks) {
    swiglu(floats(joined), floats(y), rows(y), last_size(y), task, tasks);
  });
}

void Activate(TensorView x, int64_t activation, String, TensorView y) {
  launch(count(x) * kPerValue, [&](int task, int tasks) {
    activate(floats(x), floats(y), count(x), static_cast<Activation>(activation), task, tasks);
  });
}

void GroupNorm(TensorView x, TensorView weight, TensorView bias, double eps, int64_t groups, int64_t activation,
               String, TensorView y) {
  launch(count(x) * kPerValue, [&](int task, int tasks) {
    group_norm(floats(x), floats(weight), floats(bias), static_cast<float>(eps), floats(y),
               static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), count(x, 2), static_cast<int>(groups),
               static_cast<Activation>(activation), task, tasks);
  });
}

void GroupNormFactors(TensorView x, TensorView weight, TensorView bias, double eps, int64_t groups, String,
                      TensorView scale, TensorView shift) {
  launch(count(x) * kPerValue, [&](int task, int tasks) {
    group_norm_factors(floats(x), floats(weight), floats(bias), static_cast<float>(eps), floats(scale), floats(shift),
                       static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), count(x, 2),
                       static_cast<int>(groups), task, tasks);
  });
}

}  // namespace
}  // namespace edge

TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_rms_norm, edge::RmsNorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_add_rms_norm, edge::AddRmsNorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_swiglu, edge::Swiglu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_activate, edge::Activate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_group_norm, edge::GroupNorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_group_norm_factors, edge::GroupNormFactors);
