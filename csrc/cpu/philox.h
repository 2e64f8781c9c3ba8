// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) in vectors: kernels/dropout.py has the rounds as a reference. No include
// guard: a body, like vec.h, for the .inc files that draw.
//
// Each 32-bit word sits in a 64-bit lane: the widening multiply reads the low half only, so the low half of a product needs no
// mask and its high half is one shift (8 operations a round; 9 with 32-bit lanes). A lane is one call of the generator.

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
inline void in_order(const Words (&x)[4], __m512i (&out)[2]) {  // the words of calls 0, 1, ...: four a call, x[0]'s first
  const __mmask16 odd = 0xaaaa;
  const __m512i u = _mm512_mask_mov_epi32(x[0].v, odd, _mm512_slli_epi64(x[1].v, 32));
  const __m512i w = _mm512_mask_mov_epi32(x[2].v, odd, _mm512_slli_epi64(x[3].v, 32));
  out[0] = _mm512_unpacklo_epi64(u, w), out[1] = _mm512_unpackhi_epi64(u, w);
}
inline void store(const Words (&x)[4], uint32_t* out) {
  __m512i words[2];
  in_order(x, words);
  _mm512_storeu_si512(out, words[0]), _mm512_storeu_si512(out + 16, words[1]);
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
inline void in_order(const Words (&x)[4], __m256i (&out)[2]) {
  const __m256i u = _mm256_blend_epi32(x[0].v, _mm256_slli_epi64(x[1].v, 32), 0xaa);
  const __m256i w = _mm256_blend_epi32(x[2].v, _mm256_slli_epi64(x[3].v, 32), 0xaa);
  out[0] = _mm256_unpacklo_epi64(u, w), out[1] = _mm256_unpackhi_epi64(u, w);
}
inline void store(const Words (&x)[4], uint32_t* out) {
  __m256i words[2];
  in_order(x, words);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), words[1]);
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
inline void store(const Words (&x)[4], uint32_t* out) {
  for (int i = 0; i < Words::lanes; ++i)
    for (int j = 0; j < 4; ++j) *out++ = uint32_t(x[j].v[i]);
}
#endif

// x: the four words of the counter of each call, replaced by the four words drawn (their low halves; the high halves are not
// cleared). Several streams hide the latency of the multiply.
template <int streams> inline void philox(Words (&x)[streams][4], uint64_t key) {
  const Words m0 = Words::set1(0xd2511f53u), m1 = Words::set1(0xcd9e8d57u);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const Words key0 = Words::set1(k0), key1 = Words::set1(k1);
#pragma GCC unroll 4
    for (int i = 0; i < streams; ++i) {
      const Words p = x[i][0] * m0, q = x[i][2] * m1;
      x[i][0] = high(q) ^ x[i][1] ^ key0, x[i][1] = q;
      x[i][2] = high(p) ^ x[i][3] ^ key1, x[i][3] = p;
    }
  }
}
