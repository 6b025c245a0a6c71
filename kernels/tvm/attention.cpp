// TVM's calls of the attention over a KV cache, which is written in place.
#include "../cpu/edge_kernels.h"
#include "views.h"

namespace edge {
namespace {

// shape: heads, kv_heads, window.
void attend(const AttentionInput& input, const AttentionShape& shape, const TensorView& last,
            const TensorView& past_key, const TensorView& past_value, const TensorView& y) {
  const auto* at = data<int32_t>(last);
  const int64_t rows = int64_t{shape.batch} * shape.steps;
  launch(rows * shape.kv_heads * shape.width * 2, [&](int task, int tasks) {
    kv_append(input, shape, at, floats(past_key), floats(past_value), task, tasks);
  });
  launch(rows * shape.heads * shape.width * 2 * (at[0] + 1), [&](int task, int tasks) {
    kv_attend(input, shape, at, floats(past_key), floats(past_value), floats(y), task, tasks);
  });
}

AttentionShape shape_of(const TensorView& y, const TensorView& past_key, const Shape& numbers, double scale,
                        double softcap) {
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  return {size(y.size(0)),
          size(y.size(1)),
          size(numbers[0]),
          size(numbers[1]),
          size(past_key.size(3)),
          size(past_key.size(2)),
          static_cast<float>(scale),
          size(numbers[2]),
          static_cast<float>(softcap)};
}

void KvAttention(TensorView query, TensorView key, TensorView value, TensorView past_key, TensorView past_value,
                 TensorView last, Optional<TensorView> cos, Optional<TensorView> sin, Shape numbers, double scale,
                 double softcap, String, TensorView y) {
  const AttentionShape shape = shape_of(y, past_key, numbers, scale, softcap);
  const AttentionInput input{floats(query),      floats(key),      floats(value), last_size(query),
                             last_size(key),     last_size(value), floats(cos),   floats(sin)};
  attend(input, shape, last, past_key, past_value, y);
}

// The rows hold query, key and value one after the other.
void KvAttentionPacked(TensorView rows, TensorView past_key, TensorView past_value, TensorView last,
                       Optional<TensorView> cos, Optional<TensorView> sin, Shape numbers, double scale,
                       double softcap, String, TensorView y) {
  const AttentionShape shape = shape_of(y, past_key, numbers, scale, softcap);
  const float* query = floats(rows);
  const float* key = query + shape.heads * shape.width;
  const float* value = key + shape.kv_heads * shape.width;
  const int64_t stride = last_size(rows);
  attend({query, key, value, stride, stride, stride, floats(cos), floats(sin)}, shape, last, past_key, past_value, y);
}

}  // namespace
}  // namespace edge

TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_kv_attention, edge::KvAttention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(edge_kv_attention_packed, edge::KvAttentionPacked);
