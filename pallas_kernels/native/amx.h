// Tile registers: eight of them, of up to 16 rows of 64 bytes.
#ifndef MILLRACE_NATIVE_AMX_H_
#define MILLRACE_NATIVE_AMX_H_

#include <immintrin.h>

#include <cstdint>

namespace millrace {
namespace {

inline constexpr int64_t kTileRows = 16, kTileBytes = 64, kTile = kTileRows * kTileBytes;

// Before a tile instruction reads what was written: compilers do not see that it reads memory (GCC before 14 leaves out
// stores that only _tile_loadconfig would read).
inline void finish_stores() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows), row_bytes[tile] = static_cast<uint16_t>(num_bytes);
  }
  void load() const {
    asm volatile("" : : "r"(this) : "memory");
    _tile_loadconfig(this);
  }
};

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_AMX_H_
