#include "gated_activation.h"
#include "simd_avx2.h"

namespace millrace {

void gate_avx2(const GatedActivation& problem, int64_t first, int64_t count) { gate<Avx2>(problem, first, count); }

}  // namespace millrace
