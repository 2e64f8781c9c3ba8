// Vec<float> and Vec<double>: one register of the instruction set that SWIFTK_ISA names (no include guard: this file is
// included once per instruction set, inside its namespace, by for_each_isa.h).
//
//   width             lanes: float 16 / 8 / 8, double 8 / 4 / 4 for avx512 / avx2 / portable
//   load, load_n      load_n(p, n) reads n < width elements and fills the rest with zero; it never touches p[n]
//   store, store_n    bf16 sources and targets convert (round to nearest even, NaN stays NaN, subnormals kept)
//   fma(a, b, c)      a * b + c, fused where the instruction set has it (portable: two roundings)
//   sum(v), hmax(v)   one fixed tree: lanes i and i + width/2 first
//   sum4(a, b, c, d, out)   out[0..3] = sum(a), sum(b), sum(c), sum(d): the same tree, the shuffles shared
//   dot(a, b, c)      c + a * b where lanes carry partial sums over K: fma, or vdpbf16ps (two products a lane) for
//                     Vec<bf16>, which only avx512 has; vdpbf16ps treats subnormal inputs and results as zero
//   Dot<T>            how T enters a dot product: load(p, parts) reads `step` consecutive elements into registers of the
//                     packed type P, so that packed and unpacked operands give the same sums (kernels/linear.py)
//   exp(v)            relative error below 3e-7 (float), 2e-15 (double); exp(-inf) = 0, exp(NaN) = NaN
//   transpose(r)      r[0], ..., r[width - 1] as the rows of a square
//   tanh(v)           relative error below 4e-7 (float), 3e-15 (double), for small arguments too
//   select_less(a, b, x, y)   a < b ? x : y; y where a or b is NaN
//
// Every operation acts on each lane alone, so a value does not depend on the lane it sits in or on its neighbours.

template <class A> struct Vec;

#if SWIFTK_ISA == 2

template <> struct Vec<float> {
  static constexpr int width = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
  }
  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load_n(const bf16* p, int n) {
    __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store_n(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), to_bf16()); }
  static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
  __m256i to_bf16() const {  // integer rounding: vcvtneps2bf16 would flush subnormals
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    return _mm512_cvtepi32_epi16(r);
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float sum(Vec<float> a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float hmax(Vec<float> a) {
  __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* out) {
  auto half = [](Vec<float> x) { return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)); };
  auto pair = [](__m256 x, __m256 y) {  // x's quarter in the low half, y's in the high half
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  __m256 ab = pair(half(a), half(b)), cd = pair(half(c), half(d));
  __m256 lo = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)), hi = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  __m256 t = _mm256_add_ps(lo, hi);  // a0 a1 c0 c1 | b0 b1 d0 d1
  t = _mm256_add_ps(t, _mm256_shuffle_ps(t, t, _MM_SHUFFLE(2, 3, 0, 1)));
  __m128 ac = _mm256_castps256_ps128(t), bd = _mm256_extractf128_ps(t, 1);
  _mm_storeu_ps(out, _mm_unpacklo_ps(_mm_shuffle_ps(ac, ac, _MM_SHUFFLE(2, 0, 2, 0)), _mm_shuffle_ps(bd, bd, _MM_SHUFFLE(2, 0, 2, 0))));
}
inline Vec<float> round_nearest(Vec<float> a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline Vec<float> scale2(Vec<float> a, Vec<float> n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
inline Vec<float> zero_below(Vec<float> x, Vec<float> low, Vec<float> y) {  // x < low ? 0 : y
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ), y.v)};
}
inline Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

template <> struct Vec<double> {
  static constexpr int width = 8;
  __m512d v;
  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec set1(double a) { return {_mm512_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
inline double sum(Vec<double> a) {
  __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  __m128d q = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
inline double hmax(Vec<double> a) {
  __m256d h = _mm256_max_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  __m128d q = _mm_max_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_max_sd(q, _mm_unpackhi_pd(q, q)));
}
inline void sum4(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* out) {
  auto half = [](Vec<double> x) { return _mm256_add_pd(_mm512_castpd512_pd256(x.v), _mm512_extractf64x4_pd(x.v, 1)); };
  auto pair = [](__m256d x, __m256d y) {
    return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
  };
  __m256d ac = pair(half(a), half(c)), bd = pair(half(b), half(d));
  _mm256_storeu_pd(out, _mm256_add_pd(_mm256_unpacklo_pd(ac, bd), _mm256_unpackhi_pd(ac, bd)));
}
inline Vec<double> round_nearest(Vec<double> a) { return {_mm512_roundscale_pd(a.v, 0)}; }
inline Vec<double> scale2(Vec<double> a, Vec<double> n) { return {_mm512_scalef_pd(a.v, n.v)}; }
inline Vec<double> zero_below(Vec<double> x, Vec<double> low, Vec<double> y) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, low.v, _CMP_NLT_UQ), y.v)};
}
inline Vec<double> select_less(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

#elif SWIFTK_ISA == 1

template <> struct Vec<float> {
  static constexpr int width = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static Vec load_n(const bf16* p, int n) {
    alignas(16) uint16_t tail[8] = {};
    std::memcpy(tail, p, size_t(n) * 2);
    return from_bf16(_mm_load_si128(reinterpret_cast<const __m128i*>(tail)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store_n(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  void store_n(bf16* p, int n) const {
    alignas(16) uint16_t tail[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(tail), to_bf16());
    std::memcpy(p, tail, size_t(n) * 2);
  }
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec from_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  __m128i to_bf16() const {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float sum(Vec<float> a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float hmax(Vec<float> a) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* out) {
  auto pair = [](__m256 x, __m256 y) {  // x's half in the low half, y's in the high half
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  __m256 ab = pair(a.v, b.v), cd = pair(c.v, d.v);
  __m256 lo = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)), hi = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  __m256 t = _mm256_add_ps(lo, hi);  // a0 a1 c0 c1 | b0 b1 d0 d1
  t = _mm256_add_ps(t, _mm256_shuffle_ps(t, t, _MM_SHUFFLE(2, 3, 0, 1)));
  __m128 ac = _mm256_castps256_ps128(t), bd = _mm256_extractf128_ps(t, 1);
  _mm_storeu_ps(out, _mm_unpacklo_ps(_mm_shuffle_ps(ac, ac, _MM_SHUFFLE(2, 0, 2, 0)), _mm_shuffle_ps(bd, bd, _MM_SHUFFLE(2, 0, 2, 0))));
}
inline Vec<float> round_nearest(Vec<float> a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec<float> scale2(Vec<float> a, Vec<float> n) {  // a * 2^n for |n| <= 252, in two exact steps
  __m256i e = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
  __m256i bias = _mm256_set1_epi32(127);
  __m256 a1 = _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return {_mm256_mul_ps(a1, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)))};
}
inline Vec<float> zero_below(Vec<float> x, Vec<float> low, Vec<float> y) {  // x < low ? 0 : y
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, low.v, _CMP_NLT_UQ), y.v)};
}
inline Vec<float> select_less(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

template <> struct Vec<double> {
  static constexpr int width = 4;
  __m256d v;
  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec set1(double a) { return {_mm256_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, mask(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_n(double* p, int n) const { _mm256_maskstore_pd(p, mask(n), v); }
  static __m256i mask(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
inline double sum(Vec<double> a) {
  __m128d q = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
inline double hmax(Vec<double> a) {
  __m128d q = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(q, _mm_unpackhi_pd(q, q)));
}
inline void sum4(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* out) {
  auto pair = [](__m256d x, __m256d y) {
    return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
  };
  __m256d ac = pair(a.v, c.v), bd = pair(b.v, d.v);
  _mm256_storeu_pd(out, _mm256_add_pd(_mm256_unpacklo_pd(ac, bd), _mm256_unpackhi_pd(ac, bd)));
}
inline Vec<double> round_nearest(Vec<double> a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec<double> scale2(Vec<double> a, Vec<double> n) {
  __m256i e = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v));
  __m256i half = _mm256_cvtepi32_epi64(_mm_srai_epi32(_mm256_cvtpd_epi32(n.v), 1)), rest = _mm256_sub_epi64(e, half);
  __m256i bias = _mm256_set1_epi64x(1023);
  __m256d a1 = _mm256_mul_pd(a.v, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(half, bias), 52)));
  return {_mm256_mul_pd(a1, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(rest, bias), 52)))};
}
inline Vec<double> zero_below(Vec<double> x, Vec<double> low, Vec<double> y) {
  return {_mm256_and_pd(_mm256_cmp_pd(x.v, low.v, _CMP_NLT_UQ), y.v)};
}
inline Vec<double> select_less(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
}

#else  // portable: arrays that the compiler vectorises with whatever the baseline has

template <class A> struct Vec {
  static constexpr int width = 32 / sizeof(A);
  A v[width];
  static Vec zero() { return set1(A(0)); }
  static Vec set1(A a) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = a;
    return r;
  }
  template <class T> static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = A(p[i]);
    return r;
  }
  template <class T> static Vec load_n(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = A(p[i]);
    return r;
  }
  template <class T> void store(T* p) const {
    for (int i = 0; i < width; ++i) p[i] = T(v[i]);
  }
  template <class T> void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = T(v[i]);
  }
};
#define SWIFTK_LANEWISE(name, expr)                                     \
  template <class A> inline Vec<A> name(Vec<A> a, Vec<A> b) {           \
    Vec<A> r;                                                           \
    for (int i = 0; i < Vec<A>::width; ++i) r.v[i] = expr;              \
    return r;                                                           \
  }
SWIFTK_LANEWISE(operator+, a.v[i] + b.v[i])
SWIFTK_LANEWISE(operator-, a.v[i] - b.v[i])
SWIFTK_LANEWISE(operator*, a.v[i] * b.v[i])
SWIFTK_LANEWISE(operator/, a.v[i] / b.v[i])
SWIFTK_LANEWISE(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])  // like vmaxps: b where either is NaN
#undef SWIFTK_LANEWISE
template <class A> inline Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::width; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
  return r;
}
template <class A> inline A sum(Vec<A> a) {
  for (int half = Vec<A>::width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
template <class A> inline void sum4(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, A* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
template <class A> inline A hmax(Vec<A> a) {
  for (int half = Vec<A>::width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
template <class A> inline Vec<A> round_nearest(Vec<A> a) {  // |a| < 2^22; adding 1.5 * 2^23 (2^52) rounds to an integer
  const A magic = sizeof(A) == 4 ? A(12582912.0) : A(6755399441055744.0);
  Vec<A> r;
  for (int i = 0; i < Vec<A>::width; ++i) r.v[i] = (a.v[i] + magic) - magic;
  return r;
}
inline float pow2(int e, float) {
  uint32_t u = uint32_t(e + 127) << 23;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline double pow2(int e, double) {
  uint64_t u = uint64_t(e + 1023) << 52;
  double f;
  std::memcpy(&f, &u, 8);
  return f;
}
template <class A> inline Vec<A> scale2(Vec<A> a, Vec<A> n) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::width; ++i) {
    int e = n.v[i] == n.v[i] ? int(n.v[i]) : 0, half = e >> 1;
    r.v[i] = a.v[i] * pow2(half, A()) * pow2(e - half, A());
  }
  return r;
}
template <class A> inline Vec<A> zero_below(Vec<A> x, Vec<A> low, Vec<A> y) {  // x < low ? 0 : y
  for (int i = 0; i < Vec<A>::width; ++i) y.v[i] = x.v[i] < low.v[i] ? A(0) : y.v[i];
  return y;
}
template <class A> inline Vec<A> select_less(Vec<A> a, Vec<A> b, Vec<A> x, Vec<A> y) {
  for (int i = 0; i < Vec<A>::width; ++i) y.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return y;
}
#endif

template <class A> inline Vec<A> dot(Vec<A> a, Vec<A> b, Vec<A> c) { return fma(a, b, c); }

template <class T> struct Dot {  // float, double: lane l takes elements l, l + step, ...
  using P = T;
  static constexpr int parts = 1, step = Vec<T>::width;
  static void load(const T* p, Vec<T> (&x)[1]) { x[0] = Vec<T>::load(p); }
  static void load_n(const T* p, int n, Vec<T> (&x)[1]) { x[0] = Vec<T>::load_n(p, n); }
  static void load(const bf16* p, Vec<T> (&x)[1]) {
    T wide[step];
    for (int i = 0; i < step; ++i) wide[i] = T(float(p[i]));
    x[0] = Vec<T>::load(wide);
  }
};

#if SWIFTK_ISA == 2
template <> struct Vec<bf16> {  // operand of vdpbf16ps, no arithmetic of its own
  static constexpr int width = 32;
  __m512i v;
  static Vec load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static Vec load_n(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p)}; }
  void store(bf16* p) const { _mm512_storeu_si512(p, v); }
  void store_n(bf16* p, int n) const { _mm512_mask_storeu_epi16(p, __mmask32((uint64_t(1) << n) - 1), v); }
  void stream(bf16* p) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
};
inline Vec<float> dot(Vec<bf16> a, Vec<bf16> b, Vec<float> c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
template <> struct Dot<bf16> {  // lane l takes elements 2l and 2l + 1 of each 32
  using P = bf16;
  static constexpr int parts = 1, step = 32;
  static void load(const bf16* p, Vec<bf16> (&x)[1]) { x[0] = Vec<bf16>::load(p); }
  static void load_n(const bf16* p, int n, Vec<bf16> (&x)[1]) { x[0] = Vec<bf16>::load_n(p, n); }
};
#else
template <> struct Dot<bf16> {  // lane l takes elements 2l, then 2l + 1 of each 2 * width: splitting a 32-bit word is one
  using P = float;              // shift and one mask, where widening 16-bit lanes in order needs a shuffle
  static constexpr int parts = 2, step = 2 * Vec<float>::width;
  static void load(const bf16* p, Vec<float> (&x)[2]) {
#if SWIFTK_ISA == 1
    __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    x[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    x[1].v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000u))));
#else
    for (int i = 0; i < Vec<float>::width; ++i) x[0].v[i] = float(p[2 * i]), x[1].v[i] = float(p[2 * i + 1]);
#endif
  }
  static void load_n(const bf16* p, int n, Vec<float> (&x)[2]) {
    bf16 tail[step] = {};
    std::memcpy(tail, p, size_t(n) * 2);
    load(tail, x);
  }
};
#endif

#if SWIFTK_ISA == 1
template <> struct Vec<bf16> {  // 16 elements in order, to be stored or split; no arithmetic of its own
  static constexpr int width = 16;
  __m256i v;
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  void store_n(bf16* p, int n) const {
    alignas(32) uint16_t tail[width];
    _mm256_store_si256(reinterpret_cast<__m256i*>(tail), v);
    std::memcpy(p, tail, size_t(n) * 2);
  }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }
};

inline void transpose(Vec<float>* r) {  // 2 x 2 blocks, then 4 x 4, then the halves
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
      u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}
#endif
template <class A> inline void transpose(Vec<A>* r) {  // through memory
  constexpr int W = Vec<A>::width;
  A from[W][W], to[W][W];
  for (int i = 0; i < W; ++i) r[i].store(from[i]);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) to[i][j] = from[j][i];
  for (int i = 0; i < W; ++i) r[i] = Vec<A>::load(to[i]);
}

// exp(x) = 2^n exp(r), n = round(x log2 e), r = x - n ln 2 in two parts, exp(r) by its Taylor polynomial on |r| <= 0.347.
// Below -87.3 (-708) the result is 0: no subnormals, no slow path. The argument is clamped above at 88.7 (709.7).
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  V low = V::set1(-87.3f);
  V t = max(low, x);  // max(a, b) is b where x is NaN
  t = V::zero() - max(V::set1(-88.72f), V::zero() - t);
  V n = round_nearest(t * V::set1(1.44269504088896341f));
  V r = fma(n, V::set1(-0.693359375f), t);
  r = fma(n, V::set1(2.12194440e-4f), r);
  V p = V::set1(1.0f / 5040);
  p = fma(p, r, V::set1(1.0f / 720));
  p = fma(p, r, V::set1(1.0f / 120));
  p = fma(p, r, V::set1(1.0f / 24));
  p = fma(p, r, V::set1(1.0f / 6));
  p = fma(p, r, V::set1(0.5f));
  p = fma(p, r, V::set1(1.0f));
  p = fma(p, r, V::set1(1.0f));
  return zero_below(x, low, scale2(p, n));
}
inline Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  V low = V::set1(-708.0);
  V t = max(low, x);
  t = V::zero() - max(V::set1(-709.7), V::zero() - t);
  V n = round_nearest(t * V::set1(1.44269504088896340736));
  V r = fma(n, V::set1(-6.93145751953125e-1), t);
  r = fma(n, V::set1(-1.42860682030941723212e-6), r);
  V p = V::set1(1.0 / 6227020800.0);
  const double c[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (double k : c) p = fma(p, r, V::set1(k));
  return zero_below(x, low, scale2(p, n));
}

// tanh(x) = e / (e + 2) with e = expm1(2x) = 2^n (exp(r) - 1) + (2^n - 1): nothing cancels near zero, where n = 0.
template <int terms, class A> inline Vec<A> tanh_by_series(Vec<A> x, A bound, A log2e, A ln2_high, A ln2_low) {
  using V = Vec<A>;
  V y = max(V::set1(-bound), x + x);  // max(a, b) is b where x is NaN
  y = V::zero() - max(V::set1(-bound), V::zero() - y);
  const V n = round_nearest(y * V::set1(log2e));
  const V r = fma(n, V::set1(-ln2_low), fma(n, V::set1(-ln2_high), y));
  V p = V::set1(A(1) / A(terms));
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 1; --k) p = fma(p * r, V::set1(A(1) / A(k)), V::set1(A(1) / A(k)));
  const V two_n = scale2(V::set1(A(1)), n);
  const V e = fma(two_n, p * r, two_n - V::set1(A(1)));
  return e / (e + V::set1(A(2)));
}
inline Vec<float> tanh(Vec<float> x) { return tanh_by_series<8>(x, 20.0f, 1.44269504088896341f, 0.693359375f, -2.12194440e-4f); }
inline Vec<double> tanh(Vec<double> x) {
  return tanh_by_series<14>(x, 40.0, 1.44269504088896340736, 6.93145751953125e-1, 1.42860682030941723212e-6);
}
