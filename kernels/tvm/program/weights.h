// Weights of a safetensors file, mapped into memory: the header is JSON, tensors follow at the offsets it names.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace edge {

namespace json = tvm::ffi::json;
using tvm::ffi::Shape;
using tvm::ffi::String;
using tvm::ffi::Tensor;

// TVM's own code expects every tensor on a cache line.
constexpr size_t kLine = 64;

struct LineAllocator {
  void AllocData(DLTensor* tensor) {
    const size_t bytes = tvm::ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
    if (tensor->data == nullptr) throw std::bad_alloc();
    std::memset(tensor->data, 0, bytes);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// Zeros on a cache line.
inline Tensor zeros(const std::vector<int64_t>& shape, DLDataType dtype) {
  return Tensor::FromNDAlloc(LineAllocator(), Shape(shape), dtype, DLDevice{kDLCPU, 0});
}

inline size_t byte_size(const Tensor& tensor) { return tvm::ffi::GetDataSize(tensor.numel(), tensor.dtype()); }

inline DLDataType data_type(const std::string& name) {
  static const std::map<std::string, DLDataType> types = {
      {"float32", {kDLFloat, 32, 1}}, {"float16", {kDLFloat, 16, 1}}, {"uint32", {kDLUInt, 32, 1}},
      {"int32", {kDLInt, 32, 1}},     {"int64", {kDLInt, 64, 1}},     {"uint8", {kDLUInt, 8, 1}},
      {"int8", {kDLInt, 8, 1}},       {"bool", {kDLBool, 8, 1}},      {"F32", {kDLFloat, 32, 1}},
      {"F16", {kDLFloat, 16, 1}},     {"U32", {kDLUInt, 32, 1}},      {"I32", {kDLInt, 32, 1}},
      {"I64", {kDLInt, 64, 1}},       {"U8", {kDLUInt, 8, 1}},        {"I8", {kDLInt, 8, 1}},
      {"BOOL", {kDLBool, 8, 1}},
  };
  const auto found = types.find(name);
  if (found == types.end()) throw std::runtime_error("unknown type " + name);
  return found->second;
}

inline std::vector<int64_t> sizes(const json::Value& list) {
  std::vector<int64_t> result;
  for (const json::Value& size : list.cast<json::Array>()) result.push_back(size.cast<int64_t>());
  return result;
}

inline json::Object parse(const std::string& text, const std::string& where) {
  String problem;
  const json::Value value = json::Parse(String(text), &problem);
  if (!problem.empty()) throw std::runtime_error(where + ": " + problem.c_str());
  return value.cast<json::Object>();
}

// Name -> tensor. Copies, so that every tensor begins on a cache line whatever the file's layout.
inline std::map<std::string, Tensor> read_weights(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat info {};
  if (file < 0 || fstat(file, &info) != 0) throw std::runtime_error(path + ": cannot be opened");
  const auto size = static_cast<size_t>(info.st_size);
  void* mapped = size < 8 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error(path + ": cannot be mapped");
  const char* bytes = static_cast<const char*>(mapped);
  uint64_t length = 0;
  std::memcpy(&length, bytes, 8);
  if (length > size - 8) throw std::runtime_error(path + ": the header is longer than the file");
  std::map<std::string, Tensor> weights;
  for (const auto& [name, value] : parse(std::string(bytes + 8, length), path)) {
    const auto entry = value.template cast<json::Object>();
    const std::vector<int64_t> span = sizes(entry.at(String("data_offsets")));
    const Tensor tensor = zeros(sizes(entry.at(String("shape"))), data_type(entry.at(String("dtype")).cast<String>()));
    const size_t count = byte_size(tensor);
    const uint64_t begin = 8 + length + static_cast<uint64_t>(span.at(0));
    if (span[0] < 0 || static_cast<uint64_t>(span.at(1) - span[0]) != count || begin + count > size)
      throw std::runtime_error(path + ": a tensor leaves the file");
    std::memcpy(tensor.data_ptr(), bytes + begin, count);
    weights.emplace(name.template cast<String>(), tensor);
  }
  munmap(mapped, size);
  return weights;
}

}  // namespace edge
