// Products of matrices in bfloat16 with sums of float32, by instructions of AVX-512 that multiply and add
// two terms at a time, for blocks that lie in the caches. BLAS calls such products sbgemm.

#pragma once

#include "blocks.h"

namespace mmkw {
namespace sbgemm {

// Whether this processor has the instructions, and PyTorch computes with AVX-512.
bool is_available();

// A tile of gemm has at most so many rows. In gemm n, in gemm_nt k, is a multiple of COLUMNS.
constexpr int64_t ROWS = 12, COLUMNS = 32;

// C (m, n) = beta * C + A (m, k) * B (k, n). beta is 0 or 1. A lies tile by tile. In a tile the values
// of two terms lie row by row, then those of the next two; after an odd last term lie zeros. Meanwhile
// what is read next is asked for, which lies as B does, or if there is none what is read of B soon.
void gemm(int64_t m, int64_t n, int64_t k, const BFloat16* a, const BFloat16* b, int64_t ldb,
          float beta, float* c, int64_t ldc, Next next = {});

// C (m, n) += A (m, k) * B (n, k)^T. Reads B once from first to last, and asks for its next rows.
void gemm_nt(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b,
             int64_t ldb, float* c, int64_t ldc);

}  // namespace sbgemm
}  // namespace mmkw
