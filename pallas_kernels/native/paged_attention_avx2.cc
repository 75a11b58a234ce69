#include "paged_attention_single.h"
#include "paged_attention_tile.h"
#include "vector_avx2.h"

namespace millrace::paged_attention {

void attend_avx2(const Problem& p, const Item& item, float* scratch) {
  if (item.partial != nullptr) return Single<Avx2>(p, item, scratch).run();
  Tile<Avx2, FmaProduct<Avx2>>(p, item, scratch).run();
}

void finish_avx2(const Problem& p, const Item& item, int64_t num_parts) { add_parts<Avx2>(p, item, num_parts); }

}  // namespace millrace::paged_attention
