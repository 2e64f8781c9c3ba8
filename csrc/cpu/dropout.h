// Which elements dropout keeps, kChunk columns of one row at a time; kernels/dropout.py has the definition. No include guard:
// a body, like vec.h, for the .inc files that mask as they read.
//
// Philox4x32-10 (Salmon et al. 2011) keeps each 32-bit word in a 64-bit lane: the widening multiply reads the low half only, so
// the low half of a product needs no mask and its high half is one shift (8 operations a round; 9 with 32-bit lanes).

constexpr int64_t kChunk = 128;  // columns of 16 calls, eight 16-bit draws each

struct Dropout {
  int threshold;  // of 65536, an element is kept where its draw >= threshold; 0: everything is kept, the rest is not read
  const int64_t* seed_step;
  int64_t layer;
  const int64_t* token_index;  // of each row
};

#if SWIFTK_ISA == 2
struct Words {
  static constexpr int lanes = 8;
  __m512i v;
  static Words set1(uint32_t a) { return {_mm512_set1_epi64(int64_t(a))}; }
  static Words calls() { return {_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)}; }  // so that unpacking leaves them in order
};
inline Words operator*(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Words high(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline void compare(const Words (&x)[4], int threshold, uint16_t* keep) {
  const __mmask16 odd = 0xaaaa;
  const __m512i u = _mm512_mask_mov_epi32(x[0].v, odd, _mm512_slli_epi64(x[1].v, 32));
  const __m512i w = _mm512_mask_mov_epi32(x[2].v, odd, _mm512_slli_epi64(x[3].v, 32));
  const __m512i t = _mm512_set1_epi16(short(threshold));
  _mm512_storeu_si512(keep, _mm512_movm_epi16(_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(u, w), t)));
  _mm512_storeu_si512(keep + 32, _mm512_movm_epi16(_mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(u, w), t)));
}
inline Vec<float> masked(Vec<float> a, const uint16_t* keep) {
  return {_mm512_maskz_mov_ps(_mm256_movepi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep))), a.v)};
}
inline Vec<double> masked(Vec<double> a, const uint16_t* keep) {
  return {_mm512_maskz_mov_pd(_mm_movepi16_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep))), a.v)};
}
#elif SWIFTK_ISA == 1
struct Words {
  static constexpr int lanes = 4;
  __m256i v;
  static Words set1(uint32_t a) { return {_mm256_set1_epi64x(int64_t(a))}; }
  static Words calls() { return {_mm256_setr_epi64x(0, 2, 1, 3)}; }
};
inline Words operator*(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Words operator+(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
inline Words high(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline void compare(const Words (&x)[4], int threshold, uint16_t* keep) {
  const __m256i u = _mm256_blend_epi32(x[0].v, _mm256_slli_epi64(x[1].v, 32), 0xaa);
  const __m256i w = _mm256_blend_epi32(x[2].v, _mm256_slli_epi64(x[3].v, 32), 0xaa);
  const __m256i t = _mm256_set1_epi16(short(threshold));
  auto put = [&](__m256i draws, uint16_t* out) {  // unsigned draw >= t
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cmpeq_epi16(_mm256_max_epu16(draws, t), draws));
  };
  put(_mm256_unpacklo_epi64(u, w), keep);
  put(_mm256_unpackhi_epi64(u, w), keep + 16);
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
struct Words {
  static constexpr int lanes = 4;
  uint64_t v[lanes];
  static Words set1(uint32_t a) { return {{a, a, a, a}}; }
  static Words calls() { return {{0, 1, 2, 3}}; }
};
#define SWIFTK_WORDS(name, expr)                           \
  inline Words name(Words a, Words b) {                    \
    for (int i = 0; i < Words::lanes; ++i) a.v[i] = expr;  \
    return a;                                              \
  }
SWIFTK_WORDS(operator*, uint64_t(uint32_t(a.v[i])) * uint32_t(b.v[i]))
SWIFTK_WORDS(operator^, a.v[i] ^ b.v[i])
SWIFTK_WORDS(operator+, a.v[i] + b.v[i])
#undef SWIFTK_WORDS
inline Words high(Words a) {
  for (int i = 0; i < Words::lanes; ++i) a.v[i] >>= 32;
  return a;
}
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
  const Words m0 = Words::set1(0xd2511f53u), m1 = Words::set1(0xcd9e8d57u);
  constexpr int calls = kChunk / 8, pair = 2;  // two independent streams hide the latency of the multiply
  for (int c = 0; c < calls; c += pair * Words::lanes) {
    Words x[pair][4];
    for (int i = 0; i < pair; ++i) {
      const uint32_t first = uint32_t(d.layer) << 16 | uint32_t(chunk * calls + c + i * Words::lanes);
      x[i][0] = Words::set1(first) + Words::calls(), x[i][1] = step, x[i][2] = low, x[i][3] = top;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
      const Words key0 = Words::set1(k0), key1 = Words::set1(k1);
#pragma GCC unroll 2
      for (int i = 0; i < pair; ++i) {
        const Words p = x[i][0] * m0, q = x[i][2] * m1;
        x[i][0] = high(q) ^ x[i][1] ^ key0, x[i][1] = q;
        x[i][2] = high(p) ^ x[i][3] ^ key1, x[i][3] = p;
      }
    }
    for (int i = 0; i < pair; ++i) compare(x[i], d.threshold, keep + (c + i * Words::lanes) * 8);
  }
}
