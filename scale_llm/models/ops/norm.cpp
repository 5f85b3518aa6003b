// RMSNorm of rows [n, h] in BF16, in FP32, for CPUs with AVX-512 BF16.

#include "scale_llm/parallel/bf16.h"

namespace {

constexpr int64_t ROWS = 64;  // whose gradients of the weight are summed first: the same bits for any number of threads

}  // namespace

extern "C" {

// y [n, h] = x / rms * weight, and inverse [n] = 1 / rms.
void norm_forward(const bf16* x, const bf16* weight, bf16* y, float* inverse, float eps, int64_t n, int64_t h,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const bf16* row = x + i * h;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < h; c += LANES) {
      prefetch(row + h + c);
      const __m512 value = load(row + c, mask_of(h - c));
      sum = _mm512_fmadd_ps(value, value, sum);
    }
    inverse[i] = 1 / std::sqrt(_mm512_reduce_add_ps(sum) / h + eps);
    const __m512 by = _mm512_set1_ps(inverse[i]);
    for (int64_t c = 0; c < h; c += LANES) {
      const __mmask16 some = mask_of(h - c);
      store(y + i * h + c, _mm512_mul_ps(_mm512_mul_ps(load(row + c, some), by), load(weight + c, some)), some);
    }
  }
}

// Gradients of x [n, h] and of the weight [h], of that of y: with e = dy * x, dw = sum over rows of e / rms, and
// dx = dy * w / rms - x * (e . w) / (h * rms^3).
void norm_backward(const bf16* x, const bf16* weight, const float* inverse, const bf16* grad, bf16* grad_x,
                   bf16* grad_weight, int64_t n, int64_t h, int64_t threads) {
  const int64_t parts = (n + ROWS - 1) / ROWS, wide = (h + LANES - 1) / LANES * LANES;
  Buffer<float> sums(parts * wide);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t part = 0; part < parts; part++) {
      float* const sum = sums + part * wide;
      std::fill_n(sum, wide, 0.f);
      for (int64_t i = part * ROWS; i < std::min(n, (part + 1) * ROWS); i++) {
        const bf16 *row = x + i * h, *dy = grad + i * h;
        const __m512 by = _mm512_set1_ps(inverse[i]);
        __m512 total = _mm512_setzero_ps();
        for (int64_t c = 0; c < h; c += LANES) {
          const __mmask16 some = mask_of(h - c);
          prefetch(row + h + c);
          prefetch(dy + h + c);
          const __m512 product = _mm512_mul_ps(load(dy + c, some), load(row + c, some));
          total = _mm512_fmadd_ps(product, load(weight + c, some), total);
          _mm512_storeu_ps(sum + c, _mm512_fmadd_ps(product, by, _mm512_loadu_ps(sum + c)));
        }
        const float slope = _mm512_reduce_add_ps(total) * inverse[i] * inverse[i] * inverse[i] / h;
        const __m512 less = _mm512_set1_ps(slope);
        for (int64_t c = 0; c < h; c += LANES) {
          const __mmask16 some = mask_of(h - c);
          const __m512 straight = _mm512_mul_ps(_mm512_mul_ps(load(dy + c, some), load(weight + c, some)), by);
          store(grad_x + i * h + c, _mm512_fnmadd_ps(load(row + c, some), less, straight), some);
        }
      }
    }
#pragma omp for
    for (int64_t c = 0; c < h; c += LANES) {
      __m512 total = _mm512_setzero_ps();
      for (int64_t part = 0; part < parts; part++)
        total = _mm512_add_ps(total, _mm512_loadu_ps(sums + part * wide + c));
      store(grad_weight + c, total, mask_of(h - c));
    }
  }
}
}
