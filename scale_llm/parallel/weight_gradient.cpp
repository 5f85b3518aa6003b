// The gradient of a linear layer's weight on CPUs that multiply BF16, added to a matrix in FP32 by the product itself.
// Every number is summed in the same order for any number of threads.

#include "scale_llm/parallel/bf16.h"

namespace {

constexpr int64_t ROWS = 128;     // of a tile of the result
constexpr int64_t COLUMNS = 128;  // of a tile of the result
constexpr int64_t TOKENS = 512;   // of one brgemm, so that its operands stay in the second-level cache

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

// dw [out, in] += dy^T x, for x [tokens, in] and dy [tokens, out]; out even.
extern "C" void weight_gradient(const bf16* x, const bf16* dy, float* dw, int64_t tokens, int64_t in, int64_t out,
                                int64_t threads) {
  if (in == 0 || out == 0) return;
  const int64_t panels = blocks(in, COLUMNS), bands = blocks(out, ROWS), size = padded(tokens) * COLUMNS;
  // enough tasks for all threads; those of one band transpose the same gradients
  const int64_t parts = std::min(panels, blocks(2 * threads, bands));
  Buffer<bf16> b(panels * size);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t j = 0; j < panels; j++)
      pair_rows(x + j * COLUMNS, in, tokens, padded(tokens), std::min(COLUMNS, in - j * COLUMNS), b + j * size,
                COLUMNS);
    Buffer<bf16> a(ROWS * TOKENS);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t band = 0; band < bands; band++) {
      for (int64_t part = 0; part < parts; part++) {
        const int64_t i = band * ROWS, rows = std::min(ROWS, out - i);
        for (int64_t t = 0; t < tokens; t += TOKENS) {
          const int64_t n = std::min(TOKENS, tokens - t);
          columns(dy + t * out + i, out, n, padded(n), rows, a, TOKENS);
          for (int64_t j = part * panels / parts; j < (part + 1) * panels / parts; j++)
            multiply(rows, std::min(COLUMNS, in - j * COLUMNS), padded(n), a, TOKENS, b + j * size + t * COLUMNS,
                     COLUMNS, dw + i * in + j * COLUMNS, in, true);
        }
      }
    }
    at::native::cpublas::brgemm_release(true);  // AMX's tiles
  }
}
