// Calls any kernel by name with lists of buffers, integers and floats, so that one interface serves ctypes and, as a
// program that reads calls from a file, an emulator. Built by tools/kernel_library.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "edge_kernels.h"
#include "simd.h"

using namespace edge;

namespace {

struct Call {
  void* const* buffers;
  const int64_t* ints;
  const float* floats;
  int task, tasks;

  template <class T>
  T* at(int i) const {
    return static_cast<T*>(buffers[i]);
  }
  float* f(int i) const { return at<float>(i); }
  int n(int i) const { return static_cast<int>(ints[i]); }

  QuantizedWeight weight(int buffer, int first) const {
    return {at<uint32_t>(buffer), f(buffer + 1), at<uint8_t>(buffer + 2), n(first), n(first + 1), n(first + 2),
            n(first + 3)};
  }

  AttentionInput attention() const {
    return {f(0), f(1), f(2), ints[9], ints[10], ints[11], f(3), f(4)};
  }
  AttentionShape attention_shape() const {
    return {n(0), n(1), n(2), n(3), n(4), n(5), floats[0], n(6), floats[1]};
  }

  ConvShape conv() const {
    return {n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8), n(9), n(10), n(11), n(12), n(13), n(14), n(15), n(16)};
  }
  ConvFusion fusion() const {
    return {f(2), f(3), n(17) != 0, static_cast<Activation>(n(18)), f(4), f(5), static_cast<Activation>(n(19))};
  }
};

using Kernel = void (*)(const Call&);

// How many multiply-adds one thread can do: chains enough to hide the latency, nothing read or written. The count of
// them goes to the first buffer.
void multiply_adds(const Call& c) {
  constexpr int kChains = 12;
  Float total[kChains];
  for (int i = 0; i < kChains; ++i) total[i] = splat(static_cast<float>(i));
  const Float factor = splat(0.5f);
  for (int64_t n = 0; n < c.ints[0]; ++n)
    for (int i = 0; i < kChains; ++i) total[i] = total[i] * factor + 1.0f;
  volatile float sink = 0;
  for (int i = 0; i < kChains; ++i) sink = sum(total[i]);
  static_cast<void>(sink);
  *c.at<int64_t>(0) = c.ints[0] * kChains * kLanes;
}

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> table = {
      {"multiply_adds", multiply_adds},
      {"quantized_linear",
       [](const Call& c) {
         quantized_linear(c.f(0), c.weight(1, 0), c.f(4), c.f(5), c.n(4), static_cast<Accuracy>(c.n(5)), c.task,
                          c.tasks);
       }},
      {"quantized_embedding",
       [](const Call& c) {
         quantized_embedding(c.at<int32_t>(0), c.weight(1, 0), c.f(4), c.n(4), c.task, c.tasks);
       }},
      {"linear",
       [](const Call& c) { linear(c.f(0), c.f(1), c.f(2), c.f(3), c.n(0), c.n(1), c.n(2), c.task, c.tasks); }},
      {"linear_f16",
       [](const Call& c) {
         linear_f16(c.f(0), c.at<uint16_t>(1), c.f(2), c.f(3), c.n(0), c.n(1), c.n(2), c.task, c.tasks);
       }},
      {"kv_append",
       [](const Call& c) {
         kv_append(c.attention(), c.attention_shape(), c.at<int32_t>(5), c.f(6), c.f(7), c.task, c.tasks);
       }},
      {"kv_attend",
       [](const Call& c) {
         kv_attend(c.attention(), c.attention_shape(), c.at<int32_t>(5), c.f(6), c.f(7), c.f(8), c.task, c.tasks);
       }},
      {"rms_norm",
       [](const Call& c) { rms_norm(c.f(0), c.f(1), c.floats[0], c.f(2), c.n(0), c.n(1), c.task, c.tasks); }},
      {"add_rms_norm",
       [](const Call& c) {
         add_rms_norm(c.f(0), c.f(1), c.f(2), c.floats[0], c.f(3), c.f(4), c.n(0), c.n(1), c.task, c.tasks);
       }},
      {"swiglu", [](const Call& c) { swiglu(c.f(0), c.f(1), c.n(0), c.n(1), c.task, c.tasks); }},
      {"activate",
       [](const Call& c) {
         activate(c.f(0), c.f(1), c.ints[0], static_cast<Activation>(c.n(1)), c.task, c.tasks);
       }},
      {"group_norm",
       [](const Call& c) {
         group_norm(c.f(0), c.f(1), c.f(2), c.floats[0], c.f(3), c.n(0), c.n(1), c.ints[2], c.n(3),
                    static_cast<Activation>(c.n(4)), c.task, c.tasks);
       }},
      {"group_norm_factors",
       [](const Call& c) {
         group_norm_factors(c.f(0), c.f(1), c.f(2), c.floats[0], c.f(3), c.f(4), c.n(0), c.n(1), c.ints[2], c.n(3),
                            c.task, c.tasks);
       }},
      {"codebook_lookup",
       [](const Call& c) {
         codebook_lookup(c.at<int32_t>(0), c.f(1), c.f(2), c.n(0), c.n(1), c.ints[2], c.n(3), c.n(4), c.task,
                         c.tasks);
       }},
      {"nearest_code",
       [](const Call& c) {
         nearest_code(c.f(0), c.f(1), c.at<int64_t>(2), c.n(0), c.n(1), c.n(2), c.task, c.tasks);
       }},
      {"conv2d", [](const Call& c) { conv2d(c.f(0), c.f(1), c.conv(), c.fusion(), c.f(6), c.task, c.tasks); }},
      {"conv_transpose2d",
       [](const Call& c) { conv_transpose2d(c.f(0), c.f(1), c.conv(), c.fusion(), c.f(6), c.task, c.tasks); }},
  };
  return table;
}

}  // namespace

// 0, or 1 where there is no such kernel. Buffers that a kernel takes as null are null.
extern "C" __attribute__((visibility("default"))) int edge_call(const char* name, void* const* buffers, const int64_t* ints, const float* floats, int task,
                         int tasks) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return 1;
  found->second({buffers, ints, floats, task, tasks});
  return 0;
}

// The same call again and again, so that what it costs to get here is shared.
extern "C" __attribute__((visibility("default"))) int edge_repeat(const char* name, void* const* buffers, const int64_t* ints, const float* floats,
                           int times) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return 1;
  for (int i = 0; i < times; ++i) found->second({buffers, ints, floats, 0, 1});
  return 0;
}

#ifdef EDGE_PROGRAM

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "kernel_shim: %s\n", what);
  std::exit(1);
}

void read(FILE* file, void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, file) != 1) fail("the file ends early");
}

template <class T>
std::vector<T> read_list(FILE* file) {
  int64_t count;
  read(file, &count, sizeof count);
  std::vector<T> list(static_cast<size_t>(count));
  read(file, list.data(), list.size() * sizeof(T));
  return list;
}

}  // namespace

// kernel_shim FILE: runs its call (name, tasks, ints, floats, buffers: each a count and values; a count of -1 is null)
// and writes the buffers' bytes back, one after the other, to standard output.
int main(int argc, char** argv) {
  FILE* file = argc == 2 ? std::fopen(argv[1], "rb") : nullptr;
  if (!file) fail("usage: kernel_shim FILE");
  const std::vector<char> name = read_list<char>(file);
  const std::vector<int64_t> tasks = read_list<int64_t>(file), ints = read_list<int64_t>(file);
  const std::vector<float> floats = read_list<float>(file);
  const std::vector<int64_t> sizes = read_list<int64_t>(file);
  std::vector<void*> buffers;
  for (const int64_t size : sizes) {
    // Without room past the end, so that a sanitizer sees every stray access.
    buffers.push_back(size < 0 ? nullptr : std::malloc(static_cast<size_t>(size)));
    if (size > 0) read(file, buffers.back(), static_cast<size_t>(size));
  }
  std::fclose(file);
  for (int64_t task = 0; task < tasks[0]; ++task)
    if (edge_call(std::string(name.begin(), name.end()).c_str(), buffers.data(), ints.data(), floats.data(),
                  static_cast<int>(task), static_cast<int>(tasks[0])))
      fail("no such kernel");
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 0) std::fwrite(buffers[i], static_cast<size_t>(sizes[i]), 1, stdout);
  for (void* buffer : buffers) std::free(buffer);
}
#endif
