// See amx.h. A tile is a register of up to 16 rows of 64 bytes.

#include "amx.h"

#include "blocks.h"

#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cstring>
#include <string>

#if defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define HAS_AMX
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#endif

namespace mmkw {
namespace amx {
namespace {

// Rows and bytes of a row; columns of C in a tile.
constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64, WIDTH = 16;

}  // namespace

#ifdef HAS_AMX

bool is_available() {
  static const bool available = [] {
    __builtin_cpu_init();
    return std::string(blocks().cpu_level) == "AVX512" && __builtin_cpu_supports("avx512bf16") &&
           at::cpu::init_amx();
  }();
  return available;
}

namespace {

TARGET inline __m512i load_bits(const BFloat16* from, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

TARGET inline __m512i load_bits(const float* from, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(
      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from))));
}

// bfloat16 holds integers of eight bits exactly.
TARGET inline __m512i load_bits(const int8_t* from, __mmask16 mask) {
  const __m512i integers = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from));
  return _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(integers)), 16);
}

template <typename Value>
TARGET void pair_values(int64_t terms, int64_t columns, int64_t count, const Value* from,
                        int64_t stride, BFloat16* to) {
  constexpr int64_t AHEAD = 4, LINE = 64 / sizeof(Value);
  for (int64_t term = 0; term < terms; term += 2, to += 2 * columns) {
    const Value* first = from + term * stride;
    const bool has_second = term + 1 < terms;
    for (int64_t ahead = term + AHEAD; ahead < std::min(term + AHEAD + 2, terms); ahead++)
      for (int64_t c = 0; c < count; c += LINE)
        __builtin_prefetch(from + ahead * stride + c, 0, 2);
    for (int64_t c = 0; c < columns; c += WIDTH) {
      const int64_t left = std::clamp<int64_t>(count - c, 0, WIDTH);
      const __mmask16 mask = (1u << left) - 1, other = has_second ? mask : 0;
      const __m512i low = load_bits(first + c, mask), high = load_bits(first + c + stride, other);
      _mm512_storeu_si512(to + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  std::memset(to, 0, (values_of(terms, columns) - (terms + 1) / 2 * 2 * columns) * sizeof(*to));
}

// What tells the processor the sizes of the tiles: 0 to 3 are of C, 4 and 5 of A, 6 and 7 of B.
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Config(int64_t rows_of_a) {
    for (int tile = 0; tile < 8; tile++) {
      bytes[tile] = TILE_BYTES;
      rows[tile] = tile < 6 ? rows_of_a : TILE_ROWS;
    }
  }
};

// C (rows, COLUMNS) = A * B for the rows of a tile.
TARGET void multiply_tiles(int64_t steps, int64_t rows, const BFloat16* a, const BFloat16* b,
                           int64_t columns, float* c, int64_t ldc) {
  const int64_t stride = 2 * columns * sizeof(*b);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(4, a, TILE_BYTES);
    _tile_loadd(5, a + rows * TERMS, TILE_BYTES);
    _tile_loadd(6, b, stride);
    _tile_loadd(7, b + 2 * WIDTH, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, b + 4 * WIDTH, stride);
    _tile_loadd(7, b + 6 * WIDTH, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += 2 * rows * TERMS;
    b += TERMS * columns;
  }
  const int64_t stride_of_c = ldc * sizeof(*c);
  _tile_stored(0, c, stride_of_c);
  _tile_stored(1, c + WIDTH, stride_of_c);
  _tile_stored(2, c + 2 * WIDTH, stride_of_c);
  _tile_stored(3, c + 3 * WIDTH, stride_of_c);
}

TARGET void configure(const Config& config) {
  // GCC knows of the first bytes alone that the instruction reads, and would not write the others.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

TARGET void release() {
  _tile_release();
  asm volatile("" : : : "memory");
}

}  // namespace

void pair(int64_t terms, int64_t columns, int64_t count, const float* from, int64_t stride,
          BFloat16* to) {
  pair_values(terms, columns, count, from, stride, to);
}

void pair(int64_t terms, int64_t columns, int64_t count, const BFloat16* from, int64_t stride,
          BFloat16* to) {
  pair_values(terms, columns, count, from, stride, to);
}

void pair(int64_t terms, int64_t columns, int64_t count, const int8_t* from, int64_t stride,
          BFloat16* to) {
  pair_values(terms, columns, count, from, stride, to);
}

Left::Left(const float* a, int64_t rows, int64_t terms)
    : rows_(rows), steps_(num_parts(terms, TERMS)), packed_(2 * rows * steps_ * TERMS) {
  BFloat16* to = packed_.data();
  for_tiles(rows, TILE_ROWS, [&](int64_t first, int64_t count) {
    for (int64_t step = 0; step < steps_; step++, to += 2 * count * TERMS)
      for (int64_t r = 0; r < count; r++)
        for (int64_t t = 0; t < TERMS; t++) {
          const int64_t term = step * TERMS + t;
          const float value = term < terms ? a[(first + r) * terms + term] : 0;
          const BFloat16 high = value;
          to[r * TERMS + t] = high;
          to[(count + r) * TERMS + t] = value - static_cast<float>(high);
        }
  });
}

void Left::multiply(const BFloat16* b, int64_t columns, float* c, int64_t ldc) const {
  for_tiles(rows_, TILE_ROWS, [&](int64_t first, int64_t count) {
    configure(Config(count));
    const BFloat16* a = packed_.data() + 2 * first * steps_ * TERMS;
    for (int64_t column = 0; column < columns; column += COLUMNS)
      multiply_tiles(steps_, count, a, b + 2 * column, columns, c + first * ldc + column, ldc);
  });
  // PyTorch's library configures the tiles anew.
  release();
}

#else

bool is_available() { return false; }
void pair(int64_t, int64_t, int64_t, const float*, int64_t, BFloat16*) {}
void pair(int64_t, int64_t, int64_t, const BFloat16*, int64_t, BFloat16*) {}
void pair(int64_t, int64_t, int64_t, const int8_t*, int64_t, BFloat16*) {}
Left::Left(const float*, int64_t, int64_t) {}
void Left::multiply(const BFloat16*, int64_t, float*, int64_t) const {}

#endif

}  // namespace amx
}  // namespace mmkw
