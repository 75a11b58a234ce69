#include "paged_attention_single.h"
#include "paged_attention_tile.h"
#include "vector_avx512.h"

namespace millrace::paged_attention {

void attend_avx512(const Problem& p, const Item& item, float* scratch) {
  if (item.partial != nullptr) return Single<Avx512>(p, item, scratch).run();
  Tile<Avx512, FmaProduct<Avx512>>(p, item, scratch).run();
}

void finish_avx512(const Problem& p, const Item& item, int64_t num_parts) { add_parts<Avx512>(p, item, num_parts); }

}  // namespace millrace::paged_attention
