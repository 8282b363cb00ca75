#include "memory.h"

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace agro {

namespace {
constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{1} << 21;
}  // namespace

Buffer::Buffer(int64_t count) {
  if (count == 0) return;
  // One fault a huge page instead of 512: fresh memory would cost as much as packing it.
  const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
  const int64_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  floats_ = static_cast<float*>(memory);
}

Buffer::~Buffer() { std::free(floats_); }

Buffer::Buffer(Buffer&& other) noexcept : floats_(std::exchange(other.floats_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(floats_, other.floats_);
  return *this;
}

}  // namespace agro
