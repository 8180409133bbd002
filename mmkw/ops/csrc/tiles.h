// Products and transposed copies of matrices that lie in the caches of a core, for one generation of processors.
//
// blocks.cpp includes this file once for each generation, in its own namespace. It defines before:
//   CPU_LEVEL            the name of the generation,
//   FEATURES             the generation's instructions, for the compiler; not defined for any processor,
//   LANES                floats in a vector register,
//   LOAD_BYTES           so many integers of eight bits as floats,
//   LOAD_HALVES          the bits of so many numbers of bfloat16 as floats,
//   ROWS, VECTORS        the size of a tile of gemm,
//   NT_ROWS, NT_COLUMNS  the size of a tile of gemm_nt.
// A tile has as many sums as fit into the registers beside the operands.
//
// Names follow BLAS. Matrices lie row by row. The rows of B are ldb apart.

#ifdef FEATURES
#define TARGET __attribute__((target(FEATURES)))
// Tuned so, GCC reads B within the multiplications of wide tiles, which then take two thirds of the
// time on Zen 5.
#define TILE_TARGET __attribute__((target(FEATURES TUNED_FOR_ZEN)))
#else
#define TARGET
#define TILE_TARGET
#endif
#define INLINE TARGET inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int64_t WIDTH = LANES * VECTORS;
// What one request for memory brings.
constexpr int64_t LINE_BYTES = 64;

typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

INLINE Vec load(const BFloat16* from) { return reinterpret_cast<Vec>(LOAD_HALVES(from)); }

INLINE Vec load(const int8_t* from) { return reinterpret_cast<Vec>(LOAD_BYTES(from)); }

INLINE void store(Vec value, BFloat16* to) {
  const Bits bits = reinterpret_cast<Bits>(value);
  // Half of the last digit that stays, and a bit less before an even one.
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // What is no number must not become one.
  const Bits is_number = reinterpret_cast<Bits>(value == value);
  const Bits result = (rounded & is_number) | (0x7fc0 & ~is_number);
  *reinterpret_cast<HalfVec*>(to) = __builtin_convertvector(result, HalfVec);
}

template <typename Value>
TARGET void widen(int64_t n, const Value* x, float* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) *reinterpret_cast<Vec*>(y + i) = load(x + i);
  for (; i < n; i++) y[i] = x[i];
}

TARGET void narrow(int64_t n, float scale, const float* x, BFloat16* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(scale * load(x + i), y + i);
  for (; i < n; i++) y[i] = scale * x[i];
}

// C (M, V vectors) = beta * C + A (M, k) * B (k, V vectors). beta is 0 or 1. A lies column by column.
// With every row of B one of `next`, or what lies `ahead` values after the row's, is brought to the
// second cache: in the first, rows a power of two apart would push each other out.
template <int M, int V, bool NEXT, typename Value>
INLINE void gemm_tile(int64_t k, const float* a, const Value* b, int64_t ldb, int64_t ahead,
                      Next next, float beta, float* c, int64_t ldc) {
  constexpr int64_t ROW_BYTES = V * LANES * sizeof(Value);
  // Sums stay in registers only if these loops are unrolled: GCC leaves some of them as they are.
  Vec sum[M][V];
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < V; v++)
      sum[i][v] = beta == 0 ? Vec{} : load(c + i * ldc + v * LANES);
  for (int64_t p = 0; p < k; p++) {
    Vec row[V];
    UNROLL for (int v = 0; v < V; v++) row[v] = load(b + v * LANES);
    UNROLL for (int64_t line = 0; line < ROW_BYTES; line += LINE_BYTES)
      __builtin_prefetch((NEXT ? next.rows : reinterpret_cast<const char*>(b + ahead)) + line, 0, 2);
    UNROLL for (int i = 0; i < M; i++) {
      const float value = a[i];
      UNROLL for (int v = 0; v < V; v++) sum[i][v] += value * row[v];
    }
    a += M;
    b += ldb;
    if constexpr (NEXT) next.rows += next.stride;
  }
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < V; v++)
      *reinterpret_cast<Vec*>(c + i * ldc + v * LANES) = sum[i][v];
}

// The vectors of a tile of M rows: of few it is wider, so that what is read of a row at a time is longer.
constexpr int vectors_of(int m) {
  int vectors = VECTORS;
  while (vectors < 4 * VECTORS && 3 * m * vectors <= ROWS * VECTORS) vectors *= 2;
  return vectors;
}

// The same for m <= M rows and n columns. n is a multiple of WIDTH.
template <int M, typename Value>
TILE_TARGET void gemm_tiles(int64_t m, int64_t n, int64_t k, const float* a, const Value* b,
                       int64_t ldb, float beta, float* c, int64_t ldc, Next next) {
  if constexpr (M > 1)
    if (m < M) return gemm_tiles<M - 1>(m, n, k, a, b, ldb, beta, c, ldc, next);
  // Copies are of float32, and multiplied one width of a tile at a time.
  if constexpr (std::is_same_v<Value, float>)
    if (next.rows) return gemm_tile<M, VECTORS, true>(k, a, b, ldb, 0, next, beta, c, ldc);
  constexpr int WIDE = vectors_of(M);
  int64_t j = 0;
  if constexpr (WIDE > VECTORS)
    for (; j + WIDE * LANES <= n; j += WIDE * LANES)
      gemm_tile<M, WIDE, false>(k, a, b + j, ldb, ahead_of<Value>(j, n, k, ldb), {}, beta, c + j, ldc);
  for (; j < n; j += WIDTH)
    gemm_tile<M, VECTORS, false>(k, a, b + j, ldb, ahead_of<Value>(j, n, k, ldb), {}, beta, c + j, ldc);
}

// C (m, n) = beta * C + A (m, k) * B (k, n). beta is 0 or 1. n is a multiple of WIDTH. A lies tile
// by tile, and each tile lies column by column.
template <typename Value>
TILE_TARGET void gemm(int64_t m, int64_t n, int64_t k, const float* a, const Value* b, int64_t ldb,
                 float beta, float* c, int64_t ldc, Next next) {
  for_tiles(m, ROWS, [&](int64_t i, int64_t rows) {
    gemm_tiles<ROWS>(rows, n, k, a + i * k, b, ldb, beta, c + i * ldc, ldc, i ? Next{} : next);
  });
}

// Adds up the lanes of four vectors.
INLINE Four sums_of(const Vec (&values)[4]) {
  Four sum[4];
  for (int i = 0; i < 4; i++) {
    const Four* parts = reinterpret_cast<const Four*>(&values[i]);
    sum[i] = parts[0];
    for (int part = 1; part < LANES / 4; part++) sum[i] += parts[part];
  }
  const Four low = SHUFFLE(Indices, sum[0], sum[1], 0, 1, 4, 5) +
                   SHUFFLE(Indices, sum[0], sum[1], 2, 3, 6, 7);
  const Four high = SHUFFLE(Indices, sum[2], sum[3], 0, 1, 4, 5) +
                    SHUFFLE(Indices, sum[2], sum[3], 2, 3, 6, 7);
  return SHUFFLE(Indices, low, high, 0, 2, 4, 6) + SHUFFLE(Indices, low, high, 1, 3, 5, 7);
}

// C (M, N) += A (M, k) * B (N, k)^T. k is a multiple of LANES. Asks for B's values ahead, as gemm does.
template <int M, int N>
INLINE void gemm_nt_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                         float* c, int64_t ldc) {
  Vec sum[M][N];
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int j = 0; j < N; j++) sum[i][j] = Vec{};
  for (int64_t p = 0; p < k; p += LANES) {
    const int64_t ahead = ahead_of<float>(p, k, N, ldb);
    Vec left[M];
    UNROLL for (int i = 0; i < M; i++) left[i] = load(a + i * lda + p);
    UNROLL for (int j = 0; j < N; j++) {
      const Vec right = load(b + j * ldb + p);
      __builtin_prefetch(b + j * ldb + p + ahead, 0, 2);
      UNROLL for (int i = 0; i < M; i++) sum[i][j] += left[i] * right;
    }
  }
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int first = 0; first < N; first += 4) {
      Vec four[4] = {};
      for (int j = first; j < N && j < first + 4; j++) four[j - first] = sum[i][j];
      const Four sums = sums_of(four);
      for (int j = first; j < N && j < first + 4; j++) c[i * ldc + j] += sums[j - first];
    }
}

// The same for m <= M and n <= N.
template <int M, int N>
TARGET void gemm_nt_tiles(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                          const float* b, int64_t ldb, float* c, int64_t ldc) {
  if constexpr (M > 1)
    if (m < M) return gemm_nt_tiles<M - 1, N>(m, n, k, a, lda, b, ldb, c, ldc);
  if constexpr (N > 1)
    if (n < N) return gemm_nt_tiles<M, N - 1>(m, n, k, a, lda, b, ldb, c, ldc);
  gemm_nt_tile<M, N>(k, a, lda, b, ldb, c, ldc);
}

// C (m, n) += A (m, k) * B (n, k)^T. k is a multiple of LANES.
TARGET void gemm_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
  for_tiles(n, NT_COLUMNS, [&](int64_t j, int64_t columns) {
    for_tiles(m, NT_ROWS, [&](int64_t i, int64_t rows) {
      gemm_nt_tiles<NT_ROWS, NT_COLUMNS>(rows, columns, k, a + i * lda, lda, b + j * ldb, ldb,
                                         c + i * ldc + j, ldc);
    });
  });
}

// Integers as wide as a value, eight of them. Values are moved so, whatever they are.
template <typename Value>
struct Eight {
  typedef std::conditional_t<sizeof(Value) == 4, uint32_t, uint16_t> Word;
  typedef Word Words __attribute__((vector_size(8 * sizeof(Word)), aligned(sizeof(Word)), may_alias));
};

// B (8, 8) = A (8, 8) transposed: neighbours change places, then pairs, then halves.
template <typename Value>
INLINE void omatcopy_tile(const Value* a, int64_t lda, Value* b, int64_t ldb) {
  using Words = typename Eight<Value>::Words;
  Words row[8], pair[8], four[8];
  UNROLL for (int i = 0; i < 8; i++) row[i] = *reinterpret_cast<const Words*>(a + i * lda);
  UNROLL for (int i = 0; i < 8; i += 2) {
    pair[i] = SHUFFLE(Words, row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[i + 1] = SHUFFLE(Words, row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int half = 0; half < 2; half++) {
      const Words &left = pair[i + half], &right = pair[i + half + 2];
      four[i + 2 * half] = SHUFFLE(Words, left, right, 0, 1, 8, 9, 4, 5, 12, 13);
      four[i + 2 * half + 1] = SHUFFLE(Words, left, right, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  UNROLL for (int i = 0; i < 4; i++) {
    *reinterpret_cast<Words*>(b + i * ldb) =
        SHUFFLE(Words, four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Words*>(b + (i + 4) * ldb) =
        SHUFFLE(Words, four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// B (n, m) = A (m, n) transposed.
template <typename Value>
TARGET void omatcopy(int64_t m, int64_t n, const Value* a, int64_t lda, Value* b, int64_t ldb) {
  const auto one_by_one = [&](int64_t i, int64_t rows, int64_t j) {
    for (; j < n; j++)
      for (int64_t r = i; r < i + rows; r++) b[j * ldb + r] = a[r * lda + j];
  };
  int64_t i = 0;
  for (; i + 8 <= m; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) omatcopy_tile(a + i * lda + j, lda, b + j * ldb + i, ldb);
    one_by_one(i, 8, j);
  }
  one_by_one(i, m - i, 0);
}

constexpr Blocks blocks{CPU_LEVEL,       LANES,           ROWS,           WIDTH,
                       {&gemm<float>, &gemm<BFloat16>, &gemm<int8_t>},
                       {&widen<BFloat16>, &widen<int8_t>}, &narrow,
                       {&omatcopy<float>, &omatcopy<BFloat16>},
                       &gemm_nt};

#undef INLINE
#undef CPU_LEVEL
#undef FEATURES
#undef TARGET
#undef TILE_TARGET
#undef LANES
#undef LOAD_BYTES
#undef LOAD_HALVES
#undef ROWS
#undef VECTORS
#undef NT_ROWS
#undef NT_COLUMNS
