// TVM's calls of the convolutions; one dimension is the case of height 1.
#include "../cpu/edge_kernels.h"
#include "views.h"

namespace edge {
namespace {

using Kernel = decltype(&conv2d);

// numbers: kernel, stride, padding in front and dilation (height, width each), groups, upsampling, the activations
// before and after.
void convolve(Kernel kernel, const TensorView& x, const TensorView& weight, const Optional<TensorView>& scale,
              const Optional<TensorView>& shift, const Optional<TensorView>& bias,
              const Optional<TensorView>& residual, const Shape& numbers, const TensorView& y) {
  const auto number = [&](int i) { return static_cast<int>(numbers[i]); };
  const auto height = [](const TensorView& t) { return t.ndim() == 3 ? 1 : static_cast<int>(t.size(2)); };
  const ConvShape shape{static_cast<int>(x.size(0)),
                        static_cast<int>(x.size(1)),
                        height(x),
                        last_size(x),
                        static_cast<int>(y.size(1)),
                        height(y),
                        last_size(y),
                        number(0),
                        number(1),
                        number(2),
                        number(3),
                        number(4),
                        number(5),
                        number(6),
                        number(7),
                        number(8),
                        number(9)};
  const ConvFusion fusion{floats(scale),
                          floats(shift),
                          scale.has_value() && scale.value().ndim() == 2,
                          static_cast<Activation>(numbers[10]),
                          floats(bias),
                          floats(residual),
                          static_cast<Activation>(numbers[11])};
  const int64_t taps = int64_t{shape.kernel_height} * shape.kernel_width;
  const int64_t work = count(kernel == conv2d ? y : x) * taps / shape.groups *
                       (kernel == conv2d ? shape.in_channels : shape.out_channels);
  launch(work, [&](int task, int tasks) { kernel(floats(x), floats(weight), shape, fusion, floats(y), task, tasks); });
}

void Conv(TensorView x, TensorView weight, Optional<TensorView> scale, Optional<TensorView> shift,
          Optional<TensorView> bias, Optional<TensorView> residual, Shape numbers, String, TensorView y) {
  convolve(conv2d, x, weight, scale, shift, bias, residual, numbers, y);
}

void ConvTranspose(TensorView x, TensorView weight, Optional<TensorView> scale, Optional<TensorView> shift,
                   Optional<TensorView> bias, Optional<TensorView> residual, Shape numbers, String, TensorView y) {
  convolve(conv_transpose2d, x, weight, scale, shift, bias, residual, numbers, y);
}

}  // namespace
}  // namespace edge

TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_conv, edge::Conv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_conv_transpose, edge::ConvTranspose);
