// One matmul with a weight as the native kernels see it: y[M, N] = x[M, K] times the transposed w[N, K].
//
// Weights lie as the store holds them, row by row, 4-bit values two in a byte with the even input low: nothing is
// packed for an instruction set. Where a kernel wants another order (4-bit values come apart into words of every eighth
// input), it is the activations that are reordered, which are few.
#ifndef MILLRACE_NATIVE_MATMUL_H_
#define MILLRACE_NATIVE_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>

namespace millrace {

enum class Type : uint8_t { kFloat32, kBfloat16, kFloat16 };
enum class Storage : uint8_t { kBfloat16, kInt8, kUint4 };

// A weight [N, K]: one layer of a stack, already found. Dequantized it is (value - zero point or 8) * scale + offset.
struct Weight {
  Storage storage;
  const uint8_t* values;    // [N, row_bytes]
  int64_t row_bytes;
  Type scale_type;
  const uint8_t* scales;    // [N, num_groups], null for bfloat16
  const uint8_t* zeros;     // [N, num_groups], 4-bit only, or null
  const uint8_t* offsets;   // [N, num_groups] in scale_type, or null
  int64_t num_groups;       // inputs of a group: K / num_groups
};

struct Matmul {
  int64_t num_rows, in_dim, out_dim;  // M, K, N
  Type x_type;
  const uint8_t* x;  // [M, K]
  Weight weight;
  bool rounds_x;  // to int8, with a scale for each row, or for each row and group where the weight has groups
  Type out_type;  // float32 or x_type
  uint8_t* out;   // [M, N]
  // Another weight that the same activations meet, or null: of the same storage, groups and types.
  Matmul* next = nullptr;
};

// Memory that a thread keeps, so that no step allocates; begins at a multiple of 64 bytes, holds what was left there.
class Scratch {
 public:
  uint8_t* at_least(size_t num_bytes) {
    if (num_bytes > size_) {
      size_ = (num_bytes + 4095) / 4096 * 4096;
      bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size_)));
    }
    return bytes_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t, Free> bytes_;
  size_t size_ = 0;
};

// Calls a body for every item of [0, num_items), on as many threads as there are, each taking the next that is left.
struct ForEach {
  int64_t num_threads;
  std::function<void(int64_t num_items, const std::function<void(int64_t)>& body)> run;

  void operator()(int64_t num_items, const std::function<void(int64_t)>& body) const { run(num_items, body); }
};

// One way to compute a Matmul. It calls for_each once or more, and has written all of `out` when it returns.
using MatmulKernel = void (*)(const Matmul&, const ForEach& for_each);

// Each returns null where its instruction set has nothing better than the next for this problem.
MatmulKernel amx_matmul(const Matmul&);
MatmulKernel amx_group_matmul(const Matmul&);  // which amx_matmul asks
MatmulKernel avx512_bf16_matmul(const Matmul&);
MatmulKernel avx512_vnni_matmul(const Matmul&);
MatmulKernel avx512_matmul(const Matmul&);
MatmulKernel avx2_matmul(const Matmul&);  // never null

}  // namespace millrace

#endif  // MILLRACE_NATIVE_MATMUL_H_
