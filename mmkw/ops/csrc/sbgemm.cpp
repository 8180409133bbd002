// See sbgemm.h.

#include "sbgemm.h"

#include <cstring>
#include <string>

#if defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define HAS_BFLOAT16
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE TARGET inline __attribute__((always_inline))
#endif

namespace mmkw {
namespace sbgemm {

#ifdef HAS_BFLOAT16

bool is_available() {
  static const bool available = [] {
    __builtin_cpu_init();
    return std::string(blocks().cpu_level) == "AVX512" && __builtin_cpu_supports("avx512bf16");
  }();
  return available;
}

namespace {

// Sums in a register, and the size of a tile of gemm_nt.
constexpr int64_t WIDTH = 16;
constexpr int NT_ROWS = 6, NT_COLUMNS = 4;
// The rows of B that gemm_nt asks for before it reads them.
constexpr int64_t AHEAD = 8;

// Where the numbers of two rows are taken from, in turn: of the first columns of a tile, and of the
// others. Computed beforehand, since a tile would take as long to compute them as for all else.
struct Order {
  alignas(64) uint16_t low[COLUMNS], high[COLUMNS];
};
constexpr Order ORDER = [] {
  Order order{};
  for (int i = 0; i < WIDTH; i++)
    for (int row = 0; row < 2; row++) {
      order.low[2 * i + row] = row * COLUMNS + i;
      order.high[2 * i + row] = row * COLUMNS + WIDTH + i;
    }
  return order;
}();

INLINE __m512bh as_pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

INLINE __m512bh broadcast(const BFloat16* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return as_pairs(_mm512_set1_epi32(bits));
}

// Adds the products of two terms. The last columns of a tile come second.
template <int M>
INLINE void add_pair(__m512 (&sum)[M][2], const BFloat16* a, __m512i first, __m512i second,
                     __m512i low, __m512i high) {
  const __m512bh left = as_pairs(_mm512_permutex2var_epi16(first, low, second));
  const __m512bh right = as_pairs(_mm512_permutex2var_epi16(first, high, second));
  UNROLL for (int i = 0; i < M; i++) {
    const __m512bh value = broadcast(a + 2 * i);
    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, left);
    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, right);
  }
}

// As gemm of tiles.h: with every row of B what lies `ahead` of it is brought to the second cache.
// C (M, COLUMNS) = beta * C + A (M, k) * B (k, COLUMNS).
template <int M>
INLINE void gemm_tile(int64_t k, const BFloat16* a, const BFloat16* b, int64_t ldb, int64_t ahead,
                      float beta, float* c, int64_t ldc) {
  const __m512i low = _mm512_load_si512(ORDER.low), high = _mm512_load_si512(ORDER.high);
  __m512 sum[M][2];
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < 2; v++)
      sum[i][v] = beta == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * ldc + v * WIDTH);
  for (int64_t p = 0; p + 2 <= k; p += 2) {
    __builtin_prefetch(b + ahead, 0, 2);
    __builtin_prefetch(b + ldb + ahead, 0, 2);
    add_pair<M>(sum, a, _mm512_loadu_si512(b), _mm512_loadu_si512(b + ldb), low, high);
    a += 2 * M;
    b += 2 * ldb;
  }
  if (k % 2) add_pair<M>(sum, a, _mm512_loadu_si512(b), _mm512_setzero_si512(), low, high);
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + i * ldc + v * WIDTH, sum[i][v]);
}

// The same for m <= M rows and n columns.
template <int M>
TARGET void gemm_tiles(int64_t m, int64_t n, int64_t k, const BFloat16* a, const BFloat16* b,
                       int64_t ldb, float beta, float* c, int64_t ldc, int64_t next) {
  if constexpr (M > 1)
    if (m < M) return gemm_tiles<M - 1>(m, n, k, a, b, ldb, beta, c, ldc, next);
  for (int64_t j = 0; j < n; j += COLUMNS)
    gemm_tile<M>(k, a, b + j, ldb, next ? next : ahead_of<BFloat16>(j, n, k, ldb), beta, c + j, ldc);
}

// The sums of the numbers of four registers.
INLINE __m128 sums_of(const __m512 (&x)[4]) {
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(low, high, _MM_SHUFFLE(1, 0, 1, 0)),
                                    _mm512_shuffle_ps(low, high, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four),
                                    _mm512_castps512_ps256(_mm512_shuffle_f32x4(four, four, 0x4e)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// C (M, N) += A (M, k) * B (N, k)^T.
template <int M, int N>
INLINE void gemm_nt_tile(int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb,
                         float* c, int64_t ldc) {
  __m512 sum[M][NT_COLUMNS];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < NT_COLUMNS; j++) sum[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; p += COLUMNS) {
    __m512bh left[M];
    for (int i = 0; i < M; i++) left[i] = as_pairs(_mm512_loadu_si512(a + i * lda + p));
    for (int j = 0; j < N; j++) {
      const __m512bh right = as_pairs(_mm512_loadu_si512(b + j * ldb + p));
      __builtin_prefetch(b + (j + AHEAD) * ldb + p, 0, 2);
      for (int i = 0; i < M; i++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left[i], right);
    }
  }
  constexpr __mmask8 columns = (1 << N) - 1;
  for (int i = 0; i < M; i++) {
    float* const to = c + i * ldc;
    const __m128 before = _mm_maskz_loadu_ps(columns, to);
    _mm_mask_storeu_ps(to, columns, _mm_add_ps(before, sums_of(sum[i])));
  }
}

// The same for m <= M and n <= N.
template <int M, int N>
TARGET void gemm_nt_tiles(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda,
                          const BFloat16* b, int64_t ldb, float* c, int64_t ldc) {
  if constexpr (M > 1)
    if (m < M) return gemm_nt_tiles<M - 1, N>(m, n, k, a, lda, b, ldb, c, ldc);
  if constexpr (N > 1)
    if (n < N) return gemm_nt_tiles<M, N - 1>(m, n, k, a, lda, b, ldb, c, ldc);
  gemm_nt_tile<M, N>(k, a, lda, b, ldb, c, ldc);
}

// The way from B to what is read next, in values; 0 if there is none.
int64_t from(const BFloat16* b, Next next) {
  return next.rows ? reinterpret_cast<const BFloat16*>(next.rows) - b : 0;
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, const BFloat16* a, const BFloat16* b, int64_t ldb,
          float beta, float* c, int64_t ldc, Next next) {
  const int64_t terms = (k + 1) / 2 * 2, ahead = from(b, next);
  for_tiles(m, ROWS, [&](int64_t i, int64_t rows) {
    gemm_tiles<ROWS>(rows, n, k, a + i * terms, b, ldb, beta, c + i * ldc, ldc,
                     i ? 0 : ahead);
  });
}

void gemm_nt(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b,
             int64_t ldb, float* c, int64_t ldc) {
  for_tiles(n, NT_COLUMNS, [&](int64_t j, int64_t columns) {
    for_tiles(m, NT_ROWS, [&](int64_t i, int64_t rows) {
      gemm_nt_tiles<NT_ROWS, NT_COLUMNS>(rows, columns, k, a + i * lda, lda, b + j * ldb, ldb,
                                         c + i * ldc + j, ldc);
    });
  });
}

#else

bool is_available() { return false; }
void gemm(int64_t, int64_t, int64_t, const BFloat16*, const BFloat16*, int64_t, float, float*,
          int64_t, Next) {}
void gemm_nt(int64_t, int64_t, int64_t, const BFloat16*, int64_t, const BFloat16*, int64_t, float*,
             int64_t) {}

#endif

}  // namespace sbgemm
}  // namespace mmkw
