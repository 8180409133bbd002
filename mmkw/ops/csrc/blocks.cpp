// Compiles tiles.h for every generation of processors, and chooses among them at run time.

#include "blocks.h"

#include <ATen/Version.h>

#include <algorithm>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace mmkw {
namespace {

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int Indices __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(Type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define TUNED_FOR_ZEN ""
#else
#define TUNED_FOR_ZEN ",tune=znver2"
#define SHUFFLE(Type, a, b, ...) __builtin_shuffle(a, b, Type{__VA_ARGS__})
#endif

// Compilers convert integers of eight bits one by one, and those of sixteen bits in two halves, unless
// they are told how. bfloat16 is the upper half of float32.
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx512 {
#define CPU_LEVEL "AVX512"
#define FEATURES "avx512f,avx512vl,avx512dq,avx512bw,fma"
#define LANES 16
#define LOAD_BYTES(from)   \
  _mm512_cvtepi32_ps(      \
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from))))
#define LOAD_HALVES(from)      \
  _mm512_slli_epi32(           \
      _mm512_cvtepu16_epi32(   \
          _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(from))), 16)
#define ROWS 12
#define VECTORS 2
#define NT_ROWS 4
#define NT_COLUMNS 6
#include "tiles.h"
}  // namespace avx512
namespace avx2 {
#define CPU_LEVEL "AVX2"
#define FEATURES "avx2,fma"
#define LANES 8
#define LOAD_BYTES(from)   \
  _mm256_cvtepi32_ps(      \
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(from))))
#define LOAD_HALVES(from)      \
  _mm256_slli_epi32(           \
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from))), 16)
#define ROWS 6
#define VECTORS 2
#define NT_ROWS 3
#define NT_COLUMNS 4
#include "tiles.h"
}  // namespace avx2
#endif
namespace any_processor {
#define CPU_LEVEL "DEFAULT"
#define LANES 4
#define LOAD_BYTES(from) \
  Four { float(from[0]), float(from[1]), float(from[2]), float(from[3]) }
#define LOAD_HALVES(from) \
  (__builtin_convertvector(*reinterpret_cast<const HalfVec*>(from), Bits) << 16)
#define ROWS 6
#define VECTORS 2
#define NT_ROWS 3
#define NT_COLUMNS 4
#include "tiles.h"
}  // namespace any_processor

}  // namespace

// Follows PyTorch's choice for its own kernels, also if ATEN_CPU_CAPABILITY in the environment sets
// it.
const Blocks& blocks() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const std::string capability = at::get_cpu_capability();
  static const Blocks& best = capability == "AVX512"  ? avx512::blocks
                              : capability == "AVX2" ? avx2::blocks
                                                      : any_processor::blocks;
  return best;
#else
  return any_processor::blocks;
#endif
}

}  // namespace mmkw
