// The gradient of a linear layer's weight on CPUs that multiply BF16, added to a matrix in FP32: a^T b for a [tokens,
// rows] and b [tokens, columns], where a is the narrower of the layer's input and its output's gradient, as it is the
// one that has to be turned. Every number is summed in the same order for any number of threads.

#include "scale_llm/parallel/bf16.h"

namespace {

// The second-level cache holds ROWS x COLUMNS sums, and of a and b what one brgemm reads.
constexpr int64_t ROWS = 512;
constexpr int64_t COLUMNS = 256;
constexpr int64_t TOKENS = 512;        // of one brgemm
constexpr int64_t BAND = 128;          // rows of one brgemm
constexpr int64_t LD = TOKENS + UNIT;  // of a turned; a power of two would have rows fall on the same sets of the cache
constexpr int64_t AHEAD = 4;           // rows

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

void add(float* to, __m512 x, __mmask16 some) {
  _mm512_mask_storeu_ps(to, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, to), x));
}

// dw [rows, columns] += sums [rows, columns].
void add_rows(const float* sums, int64_t rows, int64_t columns, float* dw, int64_t ld) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t c = 0; c < columns; c += LANES) {
      prefetch(dw + (i + AHEAD) * ld + c);
      add(dw + i * ld + c, _mm512_loadu_ps(sums + i * COLUMNS + c), mask_of(columns - c));
    }
  }
}

// dw [columns, rows] += sums^T.
void add_turned(const float* sums, int64_t rows, int64_t columns, float* dw, int64_t ld) {
  for (int64_t c = 0; c < columns; c += LANES) {
    for (int64_t i = 0; i < rows; i += LANES) {
      __m512i r[LANES];
      for (int64_t j = 0; j < LANES; j++) {
        prefetch(dw + (c + j) * ld + i + AHEAD * LANES);
        r[j] = _mm512_castps_si512(_mm512_loadu_ps(sums + (i + j) * COLUMNS + c));
      }
      transpose(r);
      for (int64_t j = 0; j < std::min(LANES, columns - c); j++)
        add(dw + (c + j) * ld + i, _mm512_castsi512_ps(r[j]), mask_of(rows - i));
    }
  }
}

}  // namespace

// dw [rows, columns], or if turned [columns, rows], += a^T b; rows even.
extern "C" void weight_gradient(const bf16* a, const bf16* b, float* dw, int64_t turned, int64_t tokens, int64_t rows,
                                int64_t columns, int64_t threads) {
  if (tokens == 0 || rows == 0 || columns == 0) return;
  const int64_t spans = blocks(tokens, TOKENS), groups = blocks(rows, ROWS), panels = blocks(columns, COLUMNS);
  // enough tasks for all threads; those of one panel pair the same rows of b
  const int64_t parts = std::min(groups, blocks(2 * threads, panels));
  const auto length = [&](int64_t span) { return std::min(TOKENS, tokens - span * TOKENS); };
  Buffer<bf16> turned_a(spans * rows * LD);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (int64_t s = 0; s < spans; s++)
      for (int64_t i = 0; i < rows; i += BAND)
        copy_columns(a + s * TOKENS * rows + i, rows, length(s), padded(length(s)), std::min(BAND, rows - i),
                     turned_a + (s * rows + i) * LD, LD);
    Buffer<bf16> pairs(spans * TOKENS * COLUMNS);
    Buffer<float> sums(ROWS * COLUMNS);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; panel++) {
      for (int64_t part = 0; part < parts; part++) {
        const int64_t c = panel * COLUMNS, wide = std::min(COLUMNS, columns - c);
        const int64_t first = part * groups / parts;
        for (int64_t group = first; group < (part + 1) * groups / parts; group++) {
          const int64_t r = group * ROWS, high = std::min(ROWS, rows - r);
          for (int64_t s = 0; s < spans; s++) {
            bf16* const of_span = pairs + s * TOKENS * COLUMNS;
            if (group == first)
              pair_rows(b + s * TOKENS * columns + c, columns, length(s), padded(length(s)), wide, of_span, COLUMNS);
            for (int64_t i = 0; i < high; i += BAND)
              multiply(std::min(BAND, high - i), wide, padded(length(s)), turned_a + (s * rows + r + i) * LD, LD,
                       of_span, COLUMNS, sums + i * COLUMNS, COLUMNS, s > 0);
          }
          if (turned)
            add_turned(sums, high, wide, dw + c * rows + r, rows);
          else
            add_rows(sums, high, wide, dw + r * columns + c, columns);
        }
      }
    }
    at::native::cpublas::brgemm_release(true);  // AMX's tiles
  }
}
