// Host memory: scratch rows of a thread, and large outputs.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include <sys/mman.h>

namespace sora {

// Uninitialised fp32 rows of one thread, each on a cache line of its own.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t length)
      : stride_((length + 15) / 16 * 16),
        data_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rows * stride_) * sizeof(float))),
              &std::free) {
    if (!data_ && rows * length > 0) throw std::bad_alloc();
  }

  float* row(int64_t i) const { return data_.get() + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float, decltype(&std::free)> data_;
};

// A large result usually lies on fresh pages. Writing them 4 KiB at a time costs several times the kernel itself;
// where Linux may use huge pages, one fault covers 512 of them. Advice only: failure changes nothing, and neither does
// memory that is already mapped. The range must belong to one tensor and be written whole.
inline void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (end >= begin + 2 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Zeros, on pages that are taken only when they are written.
template <class T>
class Zeros {
 public:
  explicit Zeros(int64_t size) : data_(static_cast<T*>(std::calloc(static_cast<size_t>(size), sizeof(T))), &std::free) {
    if (!data_ && size > 0) throw std::bad_alloc();
    advise_huge_pages(data_.get(), size * static_cast<int64_t>(sizeof(T)));
  }

  T* data() const { return data_.get(); }

 private:
  std::unique_ptr<T, decltype(&std::free)> data_;
};

}  // namespace sora
