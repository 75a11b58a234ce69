// Matmuls in float32 with 512-bit vectors: 16-bit activations times whatever has to be dequantized.
#include "dot_matmul.h"
#include "simd_avx512.h"

namespace millrace {

MatmulKernel avx512_matmul(const Matmul& problem) {
  return is_int8_product(problem) ? nullptr : dot_matmul<FloatOperand<Avx512>>;
}

}  // namespace millrace
