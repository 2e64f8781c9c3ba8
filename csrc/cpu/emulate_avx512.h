// The avx512 bodies on a CPU without AVX-512: every intrinsic of vec.h by SIMDe (Debian: libsimde-dev, MIT), on AVX2.
// For tests only, slow; `SWIFTK_EMULATE_AVX512=1` of setup.py defines the macro and compiles everything with -mavx2 -mfma, so
// the portable bodies of such a build are not portable. "auto" never picks it (isa.h).
//
// Differs from the hardware in vdpbf16ps: subnormals are kept, each product is rounded before it is added, and the even one
// is added first. SIMDe 0.7.4 lacks masked loads and stores, extractf32x8, stream_si512, cvtepu8_epi32, cvtepu16_epi32, cvtepi32_epi16 and cvtepi64_epi8; its scalef
// goes through exp2, which is not exact: all of these are here.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace swiftk::emulated {
template <class V, class T> V load_mask(uint64_t mask, const void* p) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const T*>(p) + i, sizeof(T));
  V v;
  std::memcpy(&v, lanes, sizeof(V));
  return v;
}
template <class T, class V> void store_mask(void* p, uint64_t mask, V v) {
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
}
template <class T, class V> V scalef(V a, V b) {
  T x[sizeof(V) / sizeof(T)], n[sizeof(V) / sizeof(T)];
  std::memcpy(x, &a, sizeof(V)), std::memcpy(n, &b, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) x[i] = n[i] == n[i] ? std::ldexp(x[i], int(std::floor(n[i]))) : x[i] + n[i];
  std::memcpy(&a, x, sizeof(V));
  return a;
}
inline simde__m512i widen(simde__m256i v) {
  uint16_t u[16];
  uint32_t w[16];
  std::memcpy(u, &v, 32);
  std::copy(u, u + 16, w);
  return simde_mm512_loadu_si512(w);
}
inline simde__m256i narrow(simde__m512i v) {
  uint16_t u[16];
  uint32_t w[16];
  std::memcpy(w, &v, 64);
  for (int i = 0; i < 16; ++i) u[i] = uint16_t(w[i]);
  return load_mask<simde__m256i, uint16_t>(0xffff, u);
}
inline simde__m512i widen_bytes(simde__m128i v) {
  uint8_t u[16];
  uint32_t w[16];
  std::memcpy(u, &v, 16);
  std::copy(u, u + 16, w);
  return simde_mm512_loadu_si512(w);
}
inline simde__m128i low_bytes(simde__m512i v) {
  uint64_t q[8];
  uint8_t u[16] = {};
  std::memcpy(q, &v, 64);
  for (int i = 0; i < 8; ++i) u[i] = uint8_t(q[i]);
  return load_mask<simde__m128i, uint8_t>(0xffff, u);
}
inline simde__m256 half(simde__m512 v, int i) {
  simde__m256 h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + 32 * i, 32);
  return h;
}
}  // namespace swiftk::emulated

#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
#define _mm512_scalef_ps(a, b) (emulated::scalef<float, simde__m512>((a), (b)))
#define _mm512_scalef_pd(a, b) (emulated::scalef<double, simde__m512d>((a), (b)))
#define _mm512_extractf32x8_ps(v, i) (emulated::half((v), (i)))
#define _mm512_cvtepu16_epi32(v) (emulated::widen(v))
#define _mm512_cvtepi32_epi16(v) (emulated::narrow(v))
#define _mm512_cvtepu8_epi32(v) (emulated::widen_bytes(v))
#define _mm512_cvtepi64_epi8(v) (emulated::low_bytes(v))
#define _mm512_stream_si512(p, v) (emulated::store_mask<uint64_t>((p), 0xff, (v)))
#define _mm512_mask_storeu_epi16(p, k, v) (emulated::store_mask<uint16_t>((p), (k), (v)))
#define _mm512_maskz_loadu_ps(k, p) (emulated::load_mask<simde__m512, float>((k), (p)))
#define _mm512_maskz_loadu_pd(k, p) (emulated::load_mask<simde__m512d, double>((k), (p)))
#define _mm512_maskz_loadu_epi16(k, p) (emulated::load_mask<simde__m512i, uint16_t>((k), (p)))
#define _mm256_maskz_loadu_epi16(k, p) (emulated::load_mask<simde__m256i, uint16_t>((k), (p)))
#define _mm512_mask_storeu_ps(p, k, v) (emulated::store_mask<float>((p), (k), (v)))
#define _mm512_mask_storeu_pd(p, k, v) (emulated::store_mask<double>((p), (k), (v)))
#define _mm256_mask_storeu_epi16(p, k, v) (emulated::store_mask<uint16_t>((p), (k), (v)))
