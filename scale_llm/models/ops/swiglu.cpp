// SwiGLU in BF16 over rows [n, 2f], gate before up, for CPUs with AVX-512 BF16; all that is between is FP32.

#include "scale_llm/parallel/bf16.h"

namespace {

// 1 / (1 + e^-x), relative error under 5e-7; 0 below -87, where the sum's reciprocal would be a subnormal number.
__m512 sigmoid(__m512 x) {
  const __m512 most = _mm512_set1_ps(126.f), power = _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E));
  const __mmask16 small = _mm512_cmp_ps_mask(power, most, _CMP_NGT_UQ);  // NaN is among them, and stays
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.f), exp2(_mm512_min_ps(most, power)));
  const __m512 y = _mm512_rcp14_ps(sum);
  return _mm512_maskz_mul_ps(small, y, _mm512_fnmadd_ps(sum, y, _mm512_set1_ps(2.f)));  // one step of Newton's
}

}  // namespace

extern "C" {

// out [n, f] = silu(gate) up. stride: of the rows of x, in elements.
void swiglu_forward(const bf16* x, int64_t stride, bf16* out, int64_t n, int64_t f, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const bf16 *gates = x + i * stride, *ups = gates + f;
    for (int64_t c = 0; c < f; c += LANES) {
      const __mmask16 some = mask_of(f - c);
      prefetch(gates + stride + c);
      prefetch(ups + stride + c);
      const __m512 gate = load(gates + c, some);
      store(out + i * f + c, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), load(ups + c, some)), some);
    }
  }
}

// grad_x [n, 2f] of x and the gradient [n, f] of what the forward pass gives; strides of their rows.
void swiglu_backward(const bf16* x, int64_t stride, const bf16* grad, int64_t grad_stride, bf16* grad_x, int64_t n,
                     int64_t f, int64_t threads) {
  const __m512 one = _mm512_set1_ps(1.f);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const bf16 *gates = x + i * stride, *ups = gates + f;
    bf16* out = grad_x + i * 2 * f;
    for (int64_t c = 0; c < f; c += LANES) {
      const __mmask16 some = mask_of(f - c);
      prefetch(gates + stride + c);
      prefetch(ups + stride + c);
      prefetch(grad + (i + 1) * grad_stride + c);
      const __m512 gate = load(gates + c, some), dy = load(grad + i * grad_stride + c, some);
      const __m512 s = sigmoid(gate), silu = _mm512_mul_ps(gate, s);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one));
      store(out + c, _mm512_mul_ps(_mm512_mul_ps(dy, load(ups + c, some)), slope), some);
      store(out + f + c, _mm512_mul_ps(dy, silu), some);
    }
  }
}
}
