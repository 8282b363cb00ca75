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
  use_huge_pages(memory, bytes);
  floats_ = static_cast<float*>(memory);
}

void use_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const int64_t begin = reinterpret_cast<int64_t>(memory);
  const int64_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (begin + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { std::free(floats_); }

Buffer::Buffer(Buffer&& other) noexcept : floats_(std::exchange(other.floats_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(floats_, other.floats_);
  return *this;
}

}  // namespace agro
