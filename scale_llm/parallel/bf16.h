// What kernels in C++ share: numbers in BF16, exponentials, oneDNN's brgemm, which libtorch_cpu exports, and the
// layouts that its operands want.
//
// "pairs": [k/2, n, 2], the layout of its second operand [k, n] in BF16.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_c,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

using bf16 = uint16_t;
constexpr int64_t LANES = 16;
constexpr int64_t UNIT = 32;  // blocks are padded to a multiple of this, so that few kinds of brgemm are made

int64_t padded(int64_t n) { return (n + UNIT - 1) / UNIT * UNIT; }

template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
    if (data == nullptr) {  // nothing may be thrown out of a parallel region
      std::fprintf(stderr, "no memory for %lld bytes\n", static_cast<long long>(n * sizeof(T)));
      std::abort();
    }
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  operator T*() const { return data; }
};

// c [m, n] (+)= a [m, k] b [k, n], b in pairs
void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t ld_a, const bf16* b, int64_t ld_b, float* c,
              int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

// Of the first n lanes.
__mmask16 mask_of(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Some of 16 numbers, as FP32; the others 0.
__m512 load(const bf16* from, __mmask16 some = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
}

void store(bf16* to, __m512 x, __mmask16 some = 0xffff) {
  _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(x));
}

// Has memory that is read soon be fetched: where rows are short or lie apart, processors do not foresee them.
void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x, relative error under 2e-7; Taylor's series to the sixth power on [-1/2, 1/2]. 0 for x below -150, NaN for NaN.
__m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // in this order: of NaN and a number, the instruction gives the second
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

void transpose(__m512i r[LANES]) {
  __m512i t[LANES];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// Rows [n, d] of a tensor as they are, zeros to row `to`.
void copy_rows(const bf16* x, int64_t stride, int64_t n, int64_t to, int64_t d, bf16* out) {
  for (int64_t i = 0; i < n; i++) std::copy_n(x + i * stride, d, out + i * d);
  std::fill_n(out + n * d, (to - n) * d, 0);
}

// Rows [n, d] as pairs of rows [to / 2, ld, 2], zeros to row `to`, an even number.
void pair_rows(const bf16* x, int64_t stride, int64_t n, int64_t to, int64_t d, bf16* out, int64_t ld) {
  for (int64_t i = 0; i < to; i += 2, out += 2 * ld) {
    const bf16 *a = x + i * stride, *b = a + stride;
    for (int64_t c = 0; c < d; c += LANES) {
      const __mmask16 some = mask_of(d - c);
      prefetch(a + 8 * stride + c);
      prefetch(b + 8 * stride + c);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(i < n ? some : 0, a + c));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(i + 1 < n ? some : 0, b + c));
      _mm512_mask_storeu_epi32(out + 2 * c, some, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// Rows [n, d], d even, turned: store(pair, i, v) with columns 2 * pair and 2 * pair + 1 of the 16 rows from i on, side
// by side; zeros to row `to`, a multiple of UNIT.
template <typename Store>
void turn(const bf16* x, int64_t stride, int64_t n, int64_t to, int64_t d, Store store) {
  for (int64_t i = 0; i < to; i += LANES) {
    for (int64_t c = 0; c < d / 2; c += LANES) {
      __m512i r[LANES];
      for (int64_t j = 0; j < LANES; j++) {
        prefetch(x + (i + LANES + j) * stride + 2 * c);
        r[j] = _mm512_maskz_loadu_epi32(i + j < n ? mask_of(d / 2 - c) : 0, x + (i + j) * stride + 2 * c);
      }
      transpose(r);
      for (int64_t j = 0; j < std::min(LANES, d / 2 - c); j++) store(c + j, i, r[j]);
    }
  }
}

// Those rows as pairs of columns [d / 2, ld, 2].
void pair_columns(const bf16* x, int64_t stride, int64_t n, int64_t to, int64_t d, bf16* out, int64_t ld) {
  turn(x, stride, n, to, d,
       [=](int64_t pair, int64_t i, __m512i v) { _mm512_storeu_si512(out + 2 * (pair * ld + i), v); });
}

// Those rows as columns [d, ld].
void copy_columns(const bf16* x, int64_t stride, int64_t n, int64_t to, int64_t d, bf16* out, int64_t ld) {
  turn(x, stride, n, to, d, [=](int64_t pair, int64_t i, __m512i v) {
    bf16* column = out + 2 * pair * ld + i;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), _mm512_cvtepi32_epi16(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column + ld), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
  });
}

}  // namespace

// Whether brgemm runs here and is exact on whole numbers: an operand of ones, [4, 32], by one of twos. oneDNN may have
// been told to do without the processor's instructions, and what it then throws must not reach a parallel region.
extern "C" int works() {
  Buffer<bf16> ones(4 * UNIT), twos(UNIT * UNIT);
  Buffer<float> sum(4 * UNIT);
  std::fill_n(ones.data, 4 * UNIT, 0x3f80);
  std::fill_n(twos.data, UNIT * UNIT, 0x4000);
  std::fill_n(sum.data, 4 * UNIT, 1.f);
  try {
    multiply(4, UNIT, UNIT, ones, UNIT, twos, UNIT, sum, UNIT, true);
    at::native::cpublas::brgemm_release(true);
  } catch (...) {
    return 0;
  }
  return std::all_of(sum.data, sum.data + 4 * UNIT, [](float x) { return x == 1 + 2 * UNIT; });
}
