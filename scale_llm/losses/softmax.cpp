// Softmax over rows of logits in BF16, in FP32, for CPUs with AVX-512 BF16; a row stays in the first-level cache.

#include "scale_llm/parallel/bf16.h"

namespace {

constexpr int64_t AHEAD = 512;  // numbers, a kilobyte

// NaN if one of them is.
float largest(const bf16* x, int64_t v) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  __mmask16 none = 0;
  for (int64_t c = 0; c < v; c += LANES) {
    prefetch(x + c + AHEAD);
    const __mmask16 some = mask_of(v - c);
    const __m512 value = load(x + c, some);
    none |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    most = _mm512_mask_max_ps(most, some, most, value);
  }
  return none ? NAN : _mm512_reduce_max_ps(most);
}

}  // namespace

extern "C" {

// Logarithm [n] of the sum of exponentials of rows [n, v] / temperature. stride: of the rows, in elements.
void log_sum_exp(const bf16* x, int64_t stride, float* out, float temperature, int64_t n, int64_t v, int64_t threads) {
  const __m512 by = _mm512_set1_ps(LOG2_E / temperature);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const bf16* row = x + i * stride;
    const float most = largest(row, v);
    if (!std::isfinite(most)) {
      out[i] = most;
      continue;
    }
    const __m512 from = _mm512_set1_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < v; c += LANES) {
      const __mmask16 some = mask_of(v - c);
      const __m512 power = _mm512_mul_ps(_mm512_sub_ps(load(row + c, some), from), by);
      sum = _mm512_mask_add_ps(sum, some, sum, exp2(power));
    }
    out[i] = static_cast<float>(most / double(temperature) + std::log(double(_mm512_reduce_add_ps(sum))));
  }
}

// out [n, v] = (exp(x / temperature - log_sum) - uniform) * scale, for x [n, v] and, of every row, log_sum and scale.
void softmax(const bf16* x, int64_t stride, const float* log_sum, const float* scale, bf16* out, int64_t out_stride,
             float temperature, float uniform, int64_t n, int64_t v, int64_t threads) {
  const __m512 by = _mm512_set1_ps(1 / temperature), log2_e = _mm512_set1_ps(LOG2_E);
  const __m512 less = _mm512_set1_ps(uniform);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const __m512 from = _mm512_set1_ps(log_sum[i]), times = _mm512_set1_ps(scale[i]);
    for (int64_t c = 0; c < v; c += LANES) {
      const __mmask16 some = mask_of(v - c);
      prefetch(x + i * stride + c + AHEAD);
      const __m512 power = _mm512_mul_ps(_mm512_fmsub_ps(load(x + i * stride + c, some), by, from), log2_e);
      store(out + i * out_stride + c, _mm512_mul_ps(_mm512_sub_ps(exp2(power), less), times), some);
    }
  }
}
}
