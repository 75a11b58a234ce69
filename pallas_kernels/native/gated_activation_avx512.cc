#include "gated_activation.h"
#include "simd_avx512.h"

namespace millrace {

void gate_avx512(const GatedActivation& problem, int64_t first, int64_t count) { gate<Avx512>(problem, first, count); }

}  // namespace millrace
