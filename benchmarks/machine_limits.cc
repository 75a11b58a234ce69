// What this machine can do at most: read memory with all cores, and multiply int8 and bf16 with the best instructions.
//
// Prints one JSON object. Products stay in registers and the L1 cache, so that nothing but the units themselves is timed;
// they are those for which it was compiled (-march=native): AMX tiles, else AVX-512 VNNI or BF16, else AVX2.
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kReads = 3;        // of the whole buffer; the fastest counts
constexpr int kTries = 3;        // of each peak; the fastest counts
constexpr int kChains = 12;      // independent sums, more than the latency of two units; AVX2 has registers for no more
constexpr double kPeakS = 0.15;  // of each try

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds from the moment when all threads are ready until all are done.
template <class Body>
double timed(int num_threads, const Body& body) {
  std::atomic<int> num_ready{0};
  std::atomic<bool> started{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      ++num_ready;
      while (!started) {
      }
      body(i);
    });
  }
  while (num_ready < num_threads) {
  }
  const double start_s = now_s();
  started = true;
  for (auto& thread : threads) thread.join();
  return now_s() - start_s;
}

#if defined(__AVX512F__)
int64_t sum(const char* data, size_t num_bytes) {
  __m512i sums[4] = {};
  for (size_t at = 0; at < num_bytes; at += 256) {
    for (int i = 0; i < 4; ++i) sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(data + at + 64 * i));
  }
  const __m512i all = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
  int64_t lanes[8];
  _mm512_storeu_si512(lanes, all);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}
#else
int64_t sum(const char* data, size_t num_bytes) {
  const auto* words = reinterpret_cast<const int64_t*>(data);
  int64_t sums[8] = {};
  for (size_t at = 0; at < num_bytes / 8; at += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += words[at + i];
  }
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}
#endif

double read_bytes_per_s(int num_threads, size_t num_bytes) {
  auto* data = static_cast<char*>(std::aligned_alloc(4096, num_bytes));
  if (data == nullptr) {
    std::fprintf(stderr, "there is no memory of %zu bytes\n", num_bytes);
    std::exit(1);
  }
  madvise(data, num_bytes, MADV_HUGEPAGE);  // as weights lie; without large pages less is read in a second
  const size_t share = num_bytes / num_threads / 4096 * 4096;
  timed(num_threads, [&](int i) { std::memset(data + i * share, i + 1, share); });
  double best_s = 1e9;
  for (int n = 0; n < kReads; ++n) {
    std::atomic<int64_t> total{0};  // so that the reads are not left out
    best_s = std::min(best_s, timed(num_threads, [&](int i) { total += sum(data + i * share, share); }));
    if (total == 1) std::puts("");
  }
  std::free(data);
  return share * num_threads / best_s;
}

// Operations per second of all threads; `run` does some products and says how many operations those were.
template <class Run>
double operations_per_s(int num_threads, const Run& run) {
  double best = 0;
  for (int n = 0; n < kTries; ++n) {
    std::vector<double> speeds(num_threads);
    timed(num_threads, [&](int i) {
      const double start_s = now_s();
      double operations = 0;
      while (now_s() < start_s + kPeakS) operations += run();
      speeds[i] = operations / (now_s() - start_s);
    });
    double all = 0;
    for (double speed : speeds) all += speed;
    best = std::max(best, all);
  }
  return best;
}

constexpr int kLoops = 2000;

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)

const char* const kInt8 = "AMX";
const char* const kBf16 = "AMX";

bool prepare() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// All eight tiles of 16 rows of 64 bytes. Written as a statement of its own, because GCC's _tile_loadconfig (before 14)
// tells the compiler of its first 8 bytes only, and the others are never stored.
void configure() {
  alignas(64) static uint8_t config[64];
  config[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

alignas(64) char tile_data[1024];

// Two tiles of rows times two of columns into four sums, as a matmul does, with nothing loaded in between. A macro,
// because GCC's tile intrinsics are macros of asm statements.
#define MILLRACE_TILES(product)       \
  configure();                        \
  _tile_zero(0);                      \
  _tile_zero(1);                      \
  _tile_zero(2);                      \
  _tile_zero(3);                      \
  _tile_loadd(4, tile_data, 64);      \
  _tile_loadd(5, tile_data, 64);      \
  _tile_loadd(6, tile_data, 64);      \
  _tile_loadd(7, tile_data, 64);      \
  for (int n = 0; n < kLoops; ++n) {  \
    product(0, 4, 6);                 \
    product(1, 4, 7);                 \
    product(2, 5, 6);                 \
    product(3, 5, 7);                 \
  }                                   \
  _tile_release();

double run_int8() {
  MILLRACE_TILES(_tile_dpbssd)
  return kLoops * 4.0 * 2 * 16 * 16 * 64;
}
double run_bf16() {
  MILLRACE_TILES(_tile_dpbf16ps)
  return kLoops * 4.0 * 2 * 16 * 16 * 32;
}

#else

bool prepare() { return true; }

// Keeps a value in a register without a word to the compiler of what it is.
template <class Vector>
void keep(Vector& value) {
  __asm__ volatile("" : "+v"(value));
}

// kChains sums take `product`, kLoops times; operations as many as the vectors hold.
template <class Sum, class Input, class Product>
void chains(const Product& product) {
  Sum sums[kChains] = {};
  Input a = {}, b = {};
  keep(b);
  for (int n = 0; n < kLoops; ++n) {
    for (int i = 0; i < kChains; ++i) {
      keep(a);  // or what is computed of a and b alone would be computed once
      sums[i] = product(sums[i], a, b);
    }
    for (int i = 0; i < kChains; ++i) keep(sums[i]);
  }
}

#if defined(__AVX512VNNI__)
const char* const kInt8 = "AVX-512 VNNI";
double run_int8() {
  chains<__m512i, __m512i>([](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
  return kLoops * kChains * 2.0 * 64;
}
#else
const char* const kInt8 = "AVX2 maddubs";
double run_int8() {
  chains<__m256i, __m256i>([](__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
  });
  return kLoops * kChains * 2.0 * 32;
}
#endif

#if defined(__AVX512BF16__)
const char* const kBf16 = "AVX-512 BF16";
double run_bf16() {
  chains<__m512, __m512bh>([](__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); });
  return kLoops * kChains * 2.0 * 32;
}
#elif defined(__AVX512F__)
const char* const kBf16 = "AVX-512 float32";
double run_bf16() {
  chains<__m512, __m512>([](__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); });
  return kLoops * kChains * 2.0 * 16;
}
#else
const char* const kBf16 = "AVX2 float32";
double run_bf16() {
  chains<__m256, __m256>([](__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); });
  return kLoops * kChains * 2.0 * 8;
}
#endif
#endif

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s NUM_THREADS NUM_BYTES\n", arguments[0]);
    return 2;
  }
  const int num_threads = std::atoi(arguments[1]);
  if (!prepare()) {
    std::fprintf(stderr, "this system does not let the process use AMX\n");
    return 1;
  }
  std::printf(
      "{\"read_bytes_per_s\": %.6g, \"int8_per_s\": %.6g, \"int8_by\": \"%s\", \"bf16_per_s\": %.6g, "
      "\"bf16_by\": \"%s\"}\n",
      read_bytes_per_s(num_threads, std::strtoull(arguments[2], nullptr, 10)), operations_per_s(num_threads, run_int8),
      kInt8, operations_per_s(num_threads, run_bf16), kBf16);
}
