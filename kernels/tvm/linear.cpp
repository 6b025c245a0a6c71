// TVM's calls of the linear layers and lookups. `node` is the Program's name of the node, for observers.
#include "../cpu/edge_kernels.h"
#include "views.h"

namespace edge {
namespace {

QuantizedWeight weight_of(const TensorView& codes, const TensorView& scales, const Optional<TensorView>& zeros,
                          int rows, int columns, int64_t bits, int64_t block) {
  return {data<uint32_t>(codes),
          floats(scales),
          zeros.has_value() ? data<uint8_t>(zeros.value()) : nullptr,
          rows,
          columns,
          static_cast<int>(bits),
          static_cast<int>(block)};
}

void QuantizedLinear(TensorView x, TensorView codes, TensorView scales, Optional<TensorView> zeros,
                     Optional<TensorView> bias, int64_t bits, int64_t block, bool fast, String, TensorView y) {
  const QuantizedWeight weight = weight_of(codes, scales, zeros, last_size(y), last_size(x), bits, block);
  const int m = rows(x);
  const Accuracy accuracy = fast ? Accuracy::kFast : Accuracy::kExact;
  launch(int64_t{m} * weight.rows * weight.columns, [&](int task, int tasks) {
    quantized_linear(floats(x), weight, floats(bias), floats(y), m, accuracy, task, tasks);
  });
}

void QuantizedEmbedding(TensorView ids, TensorView codes, TensorView scales, Optional<TensorView> zeros,
                        int64_t table_rows, int64_t bits, int64_t block, String, TensorView y) {
  const QuantizedWeight weight =
      weight_of(codes, scales, zeros, static_cast<int>(table_rows), last_size(y), bits, block);
  quantized_embedding(data<int32_t>(ids), weight, floats(y), static_cast<int>(count(ids)), 0, 1);
}

void Linear(TensorView x, TensorView weight, Optional<TensorView> bias, String, TensorView y) {
  const int m = rows(x), columns = last_size(x), out = last_size(y);
  launch(int64_t{m} * out * columns, [&](int task, int tasks) {
    linear(floats(x), floats(weight), floats(bias), floats(y), m, out, columns, task, tasks);
  });
}

void CodebookLookup(TensorView codes, TensorView tables, int64_t size, String, TensorView y) {
  const int batch = static_cast<int>(codes.size(0)), books = static_cast<int>(codes.size(1));
  codebook_lookup(data<int32_t>(codes), floats(tables), floats(y), batch, books, count(codes, 2),
                  static_cast<int>(size), last_size(tables), 0, 1);
}

void NearestCode(TensorView x, TensorView panels, int64_t codes, String, TensorView y) {
  const int m = rows(x), channels = last_size(x);
  launch(int64_t{m} * codes * channels, [&](int task, int tasks) {
    nearest_code(floats(x), floats(panels), static_cast<int64_t*>(y.data_ptr()), m, static_cast<int>(codes), channels,
                 task, tasks);
  });
}

}  // namespace
}  // namespace edge

TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_quantized_linear, edge::QuantizedLinear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_quantized_embedding, edge::QuantizedEmbedding);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_linear, edge::Linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_codebook_lookup, edge::CodebookLookup);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_nearest_code, edge::NearestCode);
