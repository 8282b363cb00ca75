// Buffers that live as long as one call.
#ifndef AGRO_MEMORY_H
#define AGRO_MEMORY_H

#include <cstdint>

namespace agro {

// `count` floats, not initialised, at a multiple of the size of a cache line or of a huge page.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  float* floats() const { return floats_; }  // nullptr if count was 0

 private:
  float* floats_ = nullptr;
};

// Asks the system for huge pages of memory that was allocated elsewhere and not written yet.
void use_huge_pages(void* memory, int64_t bytes);

}  // namespace agro

#endif
