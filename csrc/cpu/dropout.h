// Which elements dropout keeps, kChunk columns of one row at a time; kernels/dropout.py has the definition. No include guard:
// a body, like vec.h, for the .inc files that mask as they read.

#include "cpu/philox.h"

constexpr int64_t kChunk = 128;  // columns of 16 calls, eight 16-bit draws each

struct Dropout {
  int threshold;  // of 65536, an element is kept where its draw >= threshold; 0: everything is kept, the rest is not read
  const int64_t* seed_step;
  int64_t layer;
  const int64_t* token_index;  // of each row
};

#if SWIFTK_ISA == 2
inline void compare(const Words (&x)[4], int threshold, uint16_t* keep) {
  __m512i draws[2];
  in_order(x, draws);
  const __m512i t = _mm512_set1_epi16(short(threshold));
  _mm512_storeu_si512(keep, _mm512_movm_epi16(_mm512_cmpge_epu16_mask(draws[0], t)));
  _mm512_storeu_si512(keep + 32, _mm512_movm_epi16(_mm512_cmpge_epu16_mask(draws[1], t)));
}
inline Vec<float> masked(Vec<float> a, const uint16_t* keep) {
  return {_mm512_maskz_mov_ps(_mm256_movepi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep))), a.v)};
}
inline Vec<double> masked(Vec<double> a, const uint16_t* keep) {
  return {_mm512_maskz_mov_pd(_mm_movepi16_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep))), a.v)};
}
#elif SWIFTK_ISA == 1
inline void compare(const Words (&x)[4], int threshold, uint16_t* keep) {
  __m256i draws[2];
  in_order(x, draws);
  const __m256i t = _mm256_set1_epi16(short(threshold));
  auto put = [&](__m256i d, uint16_t* out) {  // unsigned draw >= t
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cmpeq_epi16(_mm256_max_epu16(d, t), d));
  };
  put(draws[0], keep);
  put(draws[1], keep + 16);
}
inline Vec<float> masked(Vec<float> a, const uint16_t* keep) {
  const __m256i m = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep)));
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(m))};
}
inline Vec<double> masked(Vec<double> a, const uint16_t* keep) {
  const __m256i m = _mm256_cvtepi16_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(keep)));
  return {_mm256_and_pd(a.v, _mm256_castsi256_pd(m))};
}
#else
inline void compare(const Words (&x)[4], int threshold, uint16_t* keep) {
  for (int i = 0; i < Words::lanes; ++i)
    for (int j = 0; j < 4; ++j, keep += 2) {
      keep[0] = int(x[j].v[i] & 0xffff) >= threshold ? 0xffff : 0;
      keep[1] = int(x[j].v[i] >> 16 & 0xffff) >= threshold ? 0xffff : 0;
    }
}
template <class A> inline Vec<A> masked(Vec<A> a, const uint16_t* keep) {
  for (int i = 0; i < Vec<A>::width; ++i) a.v[i] = keep[i] ? a.v[i] : A(0);
  return a;
}
#endif

// keep[i] is 0xffff where the element in column `chunk` kChunk + i of a row is kept, else 0.
inline void keep_chunk(const Dropout& d, int64_t row, int64_t chunk, uint16_t* keep) {
  const uint64_t seed = uint64_t(d.seed_step[0]), token = uint64_t(d.token_index[row]);
  const Words step = Words::set1(uint32_t(d.seed_step[1])), low = Words::set1(uint32_t(token)), top = Words::set1(uint32_t(token >> 32));
  constexpr int calls = kChunk / 8, pair = 2;  // two independent streams hide the latency of the multiply
  for (int c = 0; c < calls; c += pair * Words::lanes) {
    Words x[pair][4];
    for (int i = 0; i < pair; ++i) {
      const uint32_t first = uint32_t(d.layer) << 16 | uint32_t(chunk * calls + c + i * Words::lanes);
      x[i][0] = Words::set1(first) + Words::calls(), x[i][1] = step, x[i][2] = low, x[i][3] = top;
    }
    philox(x, seed);
    for (int i = 0; i < pair; ++i) compare(x[i], d.threshold, keep + (c + i * Words::lanes) * 8);
  }
}
