// Causal attention of BF16 heads with grouped queries, forward and backward, for CPUs that multiply BF16 (AVX-512 BF16
// or AMX); what is between the products stays in cache.
//
// Scores are held transposed, [keys, queries]: lanes of a vector are then queries, so that maxima and sums of the
// softmax need no step across lanes, and the operands that the next product wants are written as they come.
// Softmax by blocks of keys: Dao et al., FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
//
// Every number depends on its sequence and head alone, not on the number of threads.

#include "scale_llm/parallel/bf16.h"

#include <memory>
#include <vector>

namespace {

constexpr int64_t QUERIES = 64;  // of a block
constexpr int64_t KEYS = 128;   // of a block
constexpr float NEVER = 1e30f;  // 2^-NEVER is 0; no infinity, which compilers may be told not to expect

// Columns [d, ld] of FP32, each times its factor, as rows [n, d] of BF16.
void write_columns(const float* x, int64_t ld, const float* factor, int64_t n, int64_t d, bf16* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += LANES) {
    const __m512 by = _mm512_loadu_ps(factor + i);
    for (int64_t c = 0; c < d; c += LANES) {
      __m512i r[LANES];
      for (int64_t j = 0; j < LANES; j++)
        r[j] = c + j < d ? _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(x + (c + j) * ld + i), by))
                         : _mm512_setzero_si512();
      transpose(r);
      for (int64_t j = 0; j < std::min(LANES, n - i); j++)
        store(out + (i + j) * stride + c, _mm512_castsi512_ps(r[j]), mask_of(d - c));
    }
  }
}

void write_rows(const float* x, int64_t n, int64_t d, bf16* out, int64_t stride) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < d; c += LANES)
      store(out + i * stride + c, _mm512_maskz_loadu_ps(mask_of(d - c), x + i * d + c), mask_of(d - c));
}

// The products of two rows of BF16, summed.
float dot(const bf16* a, const bf16* b, int64_t d) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < d; c += LANES) {
    sum = _mm512_fmadd_ps(load(a + c, mask_of(d - c)), load(b + c, mask_of(d - c)), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Two rows as pairs: a0 b0 a1 b1 ...
__m512i pairs(__m512 a, __m512 b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// Which of 16 queries see a key: those whose last key is not before it.
struct Sees {
  bool all;
  __m512i last;
  __mmask16 operator()(int64_t key) const {
    return all ? 0xffff : _mm512_cmpge_epi32_mask(last, _mm512_set1_epi32(static_cast<int>(key)));
  }
};

}  // namespace

extern "C" {

// A tensor [batch, group, place, head of the group, d], or without the heads; strides in elements, that of d is 1.
struct Tensor {
  bf16* data;
  int64_t batch, group, place, head;
  bf16* at(int64_t b, int64_t g, int64_t s, int64_t h) const {
    return data + b * batch + g * group + s * place + h * head;
  }
};

// Query i sees keys 0 to end + i. starts: null, or where each of `sequences` sequences of one row begins, and the end
// of the last; `queries` is then the length of the row.
struct Shape {
  int64_t sequences, groups, heads, queries, keys, d, end, threads;
  float scale;
  const int32_t* starts;
};
}

namespace {

struct Sequence {
  int64_t row, place, queries, keys, end;  // row: of the tensors' batch; place: its first there
};

Sequence sequence_of(const Shape& s, int64_t i) {
  if (s.starts == nullptr) return {i, 0, s.queries, s.keys, s.end};
  const int64_t length = s.starts[i + 1] - s.starts[i];
  return {0, s.starts[i], length, length, 0};
}

// A block of queries, [start, start + n), and how many keys its sequence has.
struct Block {
  int64_t start, n, lanes;  // lanes: n, padded
  int64_t end, keys;
  int64_t seen() const { return std::max<int64_t>(0, std::min(keys, end + start + n)); }
  Sees sees(int64_t lane, int64_t key, int64_t count) const {
    if (key + count <= std::min(keys, end + start + 1)) return {true, _mm512_setzero_si512()};
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i last = _mm512_add_epi32(step, _mm512_set1_epi32(static_cast<int>(end + start + lane)));
    return {false, _mm512_min_epi32(last, _mm512_set1_epi32(static_cast<int>(keys - 1)))};
  }
};

// Scores [count, lanes] -> probabilities in pairs, with the running maximum and sum of each lane; sums of values
// [d, lanes] so far are brought to the new maximum.
void softmax(const Block& block, const float* scores, int64_t key, int64_t count, float scale, float* maximum,
             float* sum, float* values, int64_t d, bf16* p) {
  const __m512 by = _mm512_set1_ps(scale * LOG2_E);
  for (int64_t lane = 0; lane < block.lanes; lane += LANES) {
    const Sees sees = block.sees(lane, key, count);
    const __m512 before = _mm512_loadu_ps(maximum + lane);
    __m512 most = before;
    for (int64_t i = 0; i < count; i++) {
      const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + i * QUERIES + lane), by);
      most = _mm512_mask_max_ps(most, sees(key + i), most, score);
    }
    _mm512_storeu_ps(maximum + lane, most);
    const __m512 factor = exp2(_mm512_sub_ps(before, most));
    __m512 total = _mm512_mul_ps(_mm512_loadu_ps(sum + lane), factor);
    for (int64_t i = 0; i < count; i += 2) {
      const auto exponential = [&](int64_t j) {
        const __m512 score = _mm512_loadu_ps(scores + j * QUERIES + lane);
        const __m512 y = exp2(_mm512_fmsub_ps(score, by, most));
        return _mm512_maskz_mov_ps(sees(key + j), y);
      };
      const __m512 a = exponential(i), b = exponential(i + 1);
      total = _mm512_add_ps(total, _mm512_add_ps(a, b));
      _mm512_storeu_si512(p + i * QUERIES + 2 * lane, pairs(a, b));
    }
    _mm512_storeu_ps(sum + lane, total);
    if (key > 0)
      for (int64_t c = 0; c < d; c++) {
        float* value = values + c * QUERIES + lane;
        _mm512_storeu_ps(value, _mm512_mul_ps(_mm512_loadu_ps(value), factor));
      }
  }
}

// Scores and gradients of probabilities [count, lanes] -> probabilities [count, lanes], and the gradient of the
// products of queries and keys as [count, lanes] and in pairs. log_sum: binary logarithm of the lane's exponentials;
// delta: its sum of probabilities times their gradients.
void softmax_gradient(const Block& block, const float* scores, const float* grads, int64_t key, int64_t count,
                      float scale, const float* log_sum, const float* delta, bf16* p, bf16* ds, bf16* ds_pairs) {
  const __m512 by = _mm512_set1_ps(scale * LOG2_E), scales = _mm512_set1_ps(scale);
  for (int64_t lane = 0; lane < block.lanes; lane += LANES) {
    const Sees sees = block.sees(lane, key, count);
    const __m512 from = _mm512_loadu_ps(log_sum + lane), mean = _mm512_loadu_ps(delta + lane);
    for (int64_t i = 0; i < count; i += 2) {
      __m512 gradient[2];
      for (int64_t j = i; j < i + 2; j++) {
        const __mmask16 seen = sees(key + j);
        const __m512 y = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j * QUERIES + lane), by, from));
        const __m512 less = _mm512_sub_ps(_mm512_loadu_ps(grads + j * QUERIES + lane), mean);
        gradient[j - i] = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(y, less), scales);
        store(p + j * QUERIES + lane, _mm512_maskz_mov_ps(seen, y));
        store(ds + j * QUERIES + lane, gradient[j - i]);
      }
      _mm512_storeu_si512(ds_pairs + i * QUERIES + 2 * lane, pairs(gradient[0], gradient[1]));
    }
  }
}

// Heads of one group, which share its keys.
struct Heads {
  int64_t sequence, g, first, stop;
};

void forward_of(const Shape& shape, const Heads& heads, const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& out, float* log_sum) {
  const auto [b, place, queries, keys, end] = sequence_of(shape, heads.sequence);
  const int64_t g = heads.g;
  const int64_t d = shape.d, all = padded(keys);
  Buffer<bf16> k(all * d), v((all + KEYS) * d), q(QUERIES * d), p(KEYS * QUERIES);
  Buffer<float> scores(KEYS * QUERIES), values(QUERIES * d), maximum(QUERIES), sum(QUERIES);
  copy_rows(key.at(b, g, place, 0), key.place, keys, all, d, k);
  for (int64_t j = 0; j < keys; j += KEYS)
    copy_columns(value.at(b, g, place + j, 0), value.place, std::min(KEYS, keys - j), std::min(KEYS, all - j), d,
                 v + j * d, KEYS);
  for (int64_t h = heads.first; h < heads.stop; h++) {
    for (int64_t i = 0; i < queries; i += QUERIES) {
      const int64_t n = std::min(QUERIES, queries - i);
      const Block block{i, n, padded(n), end, keys};
      const int64_t seen = block.seen(), lanes = block.lanes;
      pair_columns(query.at(b, g, place + i, h), query.place, n, lanes, d, q, QUERIES);
      std::fill_n(maximum.data, QUERIES, -NEVER);
      std::fill_n(sum.data, QUERIES, 0.f);
      std::fill_n(values.data, seen > 0 ? 0 : QUERIES * d, 0.f);
      for (int64_t j = 0; j < seen; j += KEYS) {
        const int64_t count = padded(std::min(KEYS, seen - j));
        multiply(count, lanes, d, k + j * d, d, q, QUERIES, scores, QUERIES, false);
        softmax(block, scores, j, count, shape.scale, maximum, sum, values, d, p);
        multiply(d, lanes, count, v + j * d, KEYS, p, QUERIES, values, QUERIES, j > 0);
      }
      float* logs = log_sum + ((b * shape.groups + g) * shape.queries + place + i) * shape.heads + h;
      for (int64_t l = 0; l < lanes; l++) {
        const bool some = sum[l] != 0;
        if (l < n) logs[l * shape.heads] = some ? maximum[l] + std::log2(sum[l]) : NEVER;
        sum[l] = some ? 1 / sum[l] : 0;
      }
      write_columns(values, QUERIES, sum, n, d, out.at(b, g, place + i, h), out.place);
    }
  }
}

// Gradients of a group's keys and values, [padded keys, d].
struct OfKeys {
  Buffer<float> key, value;
  int64_t count;
  explicit OfKeys(int64_t n) : key(n), value(n), count(n) {}
  void clear() {
    std::fill_n(key.data, count, 0.f);
    std::fill_n(value.data, count, 0.f);
  }
  void add(const OfKeys& other) {
    for (int64_t i = 0; i < count; i++) key[i] += other.key[i];
    for (int64_t i = 0; i < count; i++) value[i] += other.value[i];
  }
};

// Sums those of keys and values over the heads, each head's by itself first: the same bits for any shares of heads.
std::unique_ptr<OfKeys> backward_of(const Shape& shape, const Heads& heads, const Tensor& query, const Tensor& key,
                                    const Tensor& value, const Tensor& out, const Tensor& grad, const float* log_sum,
                                    const Tensor& grad_query) {
  const auto [b, place, queries, keys, end] = sequence_of(shape, heads.sequence);
  const int64_t g = heads.g;
  const int64_t d = shape.d, all = padded(keys);
  Buffer<bf16> k(all * d), k_columns((all + KEYS) * d), v(all * d), q(QUERIES * d), q_rows(QUERIES * d);
  Buffer<bf16> dy(QUERIES * d), dy_rows(QUERIES * d), p(KEYS * QUERIES), ds(KEYS * QUERIES), ds_pairs(KEYS * QUERIES);
  Buffer<float> scores(KEYS * QUERIES), grads(KEYS * QUERIES), logs(QUERIES), delta(QUERIES), ones(QUERIES);
  Buffer<float> dq(QUERIES * d);
  auto total = std::make_unique<OfKeys>(all * d);
  OfKeys of_head(all * d);
  copy_rows(key.at(b, g, place, 0), key.place, keys, all, d, k);
  copy_rows(value.at(b, g, place, 0), value.place, keys, all, d, v);
  for (int64_t j = 0; j < keys; j += KEYS)
    copy_columns(key.at(b, g, place + j, 0), key.place, std::min(KEYS, keys - j), std::min(KEYS, all - j), d,
                 k_columns + j * d, KEYS);
  total->clear();
  std::fill_n(ones.data, QUERIES, 1.f);
  for (int64_t h = heads.first; h < heads.stop; h++) {
    of_head.clear();
    for (int64_t i = 0; i < queries; i += QUERIES) {
      const int64_t n = std::min(QUERIES, queries - i);
      const Block block{i, n, padded(n), end, keys};
      const int64_t seen = block.seen(), lanes = block.lanes, s = place + i;
      pair_columns(query.at(b, g, s, h), query.place, n, lanes, d, q, QUERIES);
      pair_columns(grad.at(b, g, s, h), grad.place, n, lanes, d, dy, QUERIES);
      pair_rows(query.at(b, g, s, h), query.place, n, lanes, d, q_rows, d);
      pair_rows(grad.at(b, g, s, h), grad.place, n, lanes, d, dy_rows, d);
      for (int64_t l = 0; l < lanes; l++) {
        logs[l] = l < n ? log_sum[((b * shape.groups + g) * shape.queries + s + l) * shape.heads + h] : NEVER;
        delta[l] = l < n ? dot(grad.at(b, g, s + l, h), out.at(b, g, s + l, h), d) : 0;
      }
      std::fill_n(dq.data, seen > 0 ? 0 : QUERIES * d, 0.f);
      for (int64_t j = 0; j < seen; j += KEYS) {
        const int64_t count = padded(std::min(KEYS, seen - j));
        multiply(count, lanes, d, k + j * d, d, q, QUERIES, scores, QUERIES, false);
        multiply(count, lanes, d, v + j * d, d, dy, QUERIES, grads, QUERIES, false);
        softmax_gradient(block, scores, grads, j, count, shape.scale, logs, delta, p, ds, ds_pairs);
        multiply(count, d, lanes, p, QUERIES, dy_rows, d, of_head.value + j * d, d, true);
        multiply(count, d, lanes, ds, QUERIES, q_rows, d, of_head.key + j * d, d, true);
        multiply(d, lanes, count, k_columns + j * d, KEYS, ds_pairs, QUERIES, dq, QUERIES, j > 0);
      }
      write_columns(dq, QUERIES, ones, n, d, grad_query.at(b, g, s, h), grad_query.place);
    }
    total->add(of_head);
  }
  return total;
}

// How many shares a group's heads are dealt out in: one, unless threads would have nothing to do.
int64_t shares_of(const Shape& s) { return s.sequences * s.groups < 2 * s.threads ? s.heads : 1; }

}  // namespace

extern "C" {

void attention_forward(const Shape* shape, const Tensor* query, const Tensor* key, const Tensor* value,
                       const Tensor* out, float* log_sum) {
  const int64_t shares = shares_of(*shape), each = shape->heads / shares;
#pragma omp parallel num_threads(shape->threads)
  {
#pragma omp for collapse(3) schedule(dynamic, 1)
    for (int64_t i = 0; i < shape->sequences; i++)
      for (int64_t g = 0; g < shape->groups; g++)
        for (int64_t share = 0; share < shares; share++)
          forward_of(*shape, {i, g, share * each, (share + 1) * each}, *query, *key, *value, *out, log_sum);
    at::native::cpublas::brgemm_release(true);  // AMX's tiles
  }
}

void attention_backward(const Shape* shape, const Tensor* query, const Tensor* key, const Tensor* value,
                        const Tensor* out, const Tensor* grad, const float* log_sum, const Tensor* grad_query,
                        const Tensor* grad_key, const Tensor* grad_value) {
  const int64_t shares = shares_of(*shape), each = shape->heads / shares;
  const int64_t groups = shape->sequences * shape->groups;
  std::vector<std::unique_ptr<OfKeys>> parts(groups * shares);
  const auto write = [&](int64_t group, const OfKeys& sums) {
    const auto [b, place, queries, keys, end] = sequence_of(*shape, group / shape->groups);
    const int64_t g = group % shape->groups;
    write_rows(sums.key, keys, shape->d, grad_key->at(b, g, place, 0), grad_key->place);
    write_rows(sums.value, keys, shape->d, grad_value->at(b, g, place, 0), grad_value->place);
  };
#pragma omp parallel num_threads(shape->threads)
  {
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; group++) {
      for (int64_t share = 0; share < shares; share++) {
        const Heads heads{group / shape->groups, group % shape->groups, share * each, (share + 1) * each};
        auto sums = backward_of(*shape, heads, *query, *key, *value, *out, *grad, log_sum, *grad_query);
        if (shares == 1)
          write(group, *sums);
        else
          parts[group * shares + share] = std::move(sums);
      }
    }
    if (shares > 1) {
#pragma omp for
      for (int64_t group = 0; group < groups; group++) {
        OfKeys& sums = *parts[group * shares];
        for (int64_t share = 1; share < shares; share++) sums.add(*parts[group * shares + share]);
        write(group, sums);
      }
    }
    at::native::cpublas::brgemm_release(true);  // AMX's tiles
  }
}
}
