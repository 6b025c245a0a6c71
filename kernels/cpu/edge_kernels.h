// CPU kernels of the fused ops: plain functions on pointers and sizes, float32 activations, row-major and contiguous.
//
// Weights come in the layouts of exporters/cpu_layout.py. `task` of `tasks` names the part of the work a call does:
// the calls for all tasks together, in any order and on any threads, make the result, and each writes its own part
// of the output only. Nothing is checked here: callers validate shapes.
#pragma once

#include <cstdint>

namespace edge __attribute__((visibility("hidden"))) {

// Rows of a weight matrix are stored in panels of this many, padded with zeros.
constexpr int kPanel = 16;
// Output channels of a convolution are stored in panels of this many.
constexpr int kChannelPanel = 8;

enum class Activation { kNone, kSilu, kSnake, kTanh };
enum class Accuracy { kExact, kFast };

// W [rows, columns] in blocks of `block` columns (a multiple of 32 / bits), the last of which may reach past `columns`.
struct QuantizedWeight {
  const uint32_t* codes;  // [panels, blocks * block * bits / 32, 16]
  const float* scales;    // [panels, blocks, 16]
  const uint8_t* zeros;   // [panels, blocks, 16], or null: 2^(bits - 1)
  int rows, columns;
  int bits;  // 2, 4 or 8
  int block;
};

// y [m, rows] = x [m, columns] . W^T + bias (or null). kExact: float32 throughout. kFast: activations are rounded to
// int8 with one scale a row and block, products are integer.
void quantized_linear(const float* x, const QuantizedWeight& weight, const float* bias, float* y, int m,
                      Accuracy accuracy, int task, int tasks);

// y [count, columns]: the dequantised rows `ids` of W.
void quantized_embedding(const int32_t* ids, const QuantizedWeight& weight, float* y, int count, int task, int tasks);

// y [m, rows] = x [m, columns] . W^T + bias (or null); weight [panels, columns, 16].
void linear(const float* x, const float* weight, const float* bias, float* y, int m, int rows, int columns, int task,
            int tasks);
// The same with IEEE half-precision weights.
void linear_f16(const float* x, const uint16_t* weight, const float* bias, float* y, int m, int rows, int columns,
                int task, int tasks);

// Where the rows of q, k and v begin, and how far one token's row is from the next, in floats: packed rows
// [q | k | v] have one stride, separate tensors each their own.
struct AttentionInput {
  const float *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  const float *cos, *sin;  // [capacity, width / 2], or null: no rotation here
};

struct AttentionShape {
  int batch, steps, heads, kv_heads, width, capacity;
  float scale;
  int window;     // newest positions that a query sees, 0 for all
  float softcap;  // 0 for none
};

// Rotates the keys and writes keys and values to their slots of the caches [batch, kv_heads, capacity, width]; the
// newest token's position is last [batch]. Every task of it comes before any of kv_attend.
void kv_append(const AttentionInput& input, const AttentionShape& shape, const int32_t* last, float* keys,
               float* values, int task, int tasks);
// y [batch, steps, heads * width]: attention of the rotated queries over the caches. Slots never written may be NaN.
void kv_attend(const AttentionInput& input, const AttentionShape& shape, const int32_t* last, const float* keys,
               const float* values, float* y, int task, int tasks);

// x, y [rows, columns]; weight [columns].
void rms_norm(const float* x, const float* weight, float eps, float* y, int rows, int columns, int task, int tasks);
// total = x + residual; y = rms_norm(total). `total` may be x or residual.
void add_rms_norm(const float* x, const float* residual, const float* weight, float eps, float* y, float* total,
                  int rows, int columns, int task, int tasks);
// joined [rows, 2 * columns] holds gate, then up; y [rows, columns] = silu(gate) * up.
void swiglu(const float* joined, float* y, int rows, int columns, int task, int tasks);
// y [count] = activation(x); y may be x. Snake is x + sin(x)^2, right to 3e-7 for |x| up to 4000.
void activate(const float* x, float* y, int64_t count, Activation activation, int task, int tasks);

// x, y [batch, channels, positions]; weight, bias [channels]; y = activation(normalised * weight + bias).
void group_norm(const float* x, const float* weight, const float* bias, float eps, float* y, int batch, int channels,
                int64_t positions, int groups, Activation activation, int task, int tasks);
// The same as factors for ConvFusion: scale, shift [batch, channels], so that y = x * scale + shift.
void group_norm_factors(const float* x, const float* weight, const float* bias, float eps, float* scale, float* shift,
                        int batch, int channels, int64_t positions, int groups, int task, int tasks);

// codes [batch, books, positions], tables [books * size, channels]; y [batch, channels, positions] is the sum over
// the books.
void codebook_lookup(const int32_t* codes, const float* tables, float* y, int batch, int books, int64_t positions,
                     int size, int channels, int task, int tasks);

// y [rows]: which of `codes` is nearest to each row of x [rows, channels], the first of those that are equally near.
// panels [panels of 16 codes, channels, 16].
void nearest_code(const float* x, const float* panels, int64_t* y, int rows, int codes, int channels, int task,
                  int tasks);

// A convolution over [batch, in_channels, in_height, in_width]; one dimension is the case of height 1. Padding on the
// far sides follows from the output's size.
struct ConvShape {
  int batch, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, pad_top, pad_left, dilation_height, dilation_width;
  int groups;
  // 2: the input is read as if each pixel were two by two (or two, when height is 1 and so stays); in_height and
  // in_width are those before. 1 for transposed convolutions.
  int upsample;
};

// What is done on the way in, before the zero padding: x -> before(x * scale + shift); and on the way out:
// after(sum + bias + residual). Each pointer may be null.
struct ConvFusion {
  const float *scale, *shift;  // [in_channels], or [batch, in_channels] with per_batch
  bool per_batch;
  Activation before;
  const float* bias;      // [out_channels]
  const float* residual;  // like y
  Activation after;
};

// weight [groups, panels of 8 output channels, in_channels / groups, kernel taps, 8]
void conv2d(const float* x, const float* weight, const ConvShape& shape, const ConvFusion& fusion, float* y, int task,
            int tasks);
void conv_transpose2d(const float* x, const float* weight, const ConvShape& shape, const ConvFusion& fusion, float* y,
                      int task, int tasks);

}  // namespace edge
