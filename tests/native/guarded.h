// Memory beside which no byte may be touched, not even by instructions that ASan does not see: tile loads, masked loads.
#ifndef MILLRACE_TESTS_NATIVE_GUARDED_H_
#define MILLRACE_TESTS_NATIVE_GUARDED_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "harness.h"

namespace millrace::test {

// Bytes between two pages that nobody may touch: they end where the second begins, or begin where the first ends.
class Guarded {
 public:
  Guarded(size_t num_bytes, bool is_at_end) {
    const size_t room = (num_bytes + kPage - 1) / kPage * kPage;
    mapped_bytes_ = room + 2 * kPage;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED, "no %zu bytes", mapped_bytes_);
    mapped_ = static_cast<uint8_t*>(mapped);
    CHECK(room == 0 || mprotect(mapped_ + kPage, room, PROT_READ | PROT_WRITE) == 0, "%zu bytes", room);
    bytes_ = mapped_ + kPage + (is_at_end ? room - num_bytes : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(mapped_, mapped_bytes_); }

  uint8_t* get() const { return bytes_; }

 private:
  static constexpr size_t kPage = 4096;  // of x86-64

  uint8_t *mapped_, *bytes_;
  size_t mapped_bytes_;
};

}  // namespace millrace::test

#endif  // MILLRACE_TESTS_NATIVE_GUARDED_H_
