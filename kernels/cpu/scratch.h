// Buffers that a thread keeps from call to call, so that kernels allocate only when a size is first seen.
#pragma once

#include <cstddef>
#include <new>

namespace edge __attribute__((visibility("hidden"))) {

constexpr std::align_val_t kCacheLine{64};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // At least `bytes` bytes on a cache line, contents undefined. Valid until the next call.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, kCacheLine);
      size_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, kCacheLine);
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

// `count` values for the purpose `Tag`; one buffer a thread and purpose.
template <class Tag, class T>
T* scratch(size_t count) {
  static thread_local Buffer buffer;
  return static_cast<T*>(buffer.reserve(count * sizeof(T)));
}

}  // namespace edge
