// A block of NF4 codes as bf16 values (kernels/nf4.py has the specification; no include guard: like vec.h it is included once
// per instruction set). The 16 values of a block, bf16(code value * absmax), stay in registers and are looked up per nibble.
//
//   Nf4Table::make(absmax)    absmax finite, float or bf16; the products are fp32, rounded to nearest even, subnormals kept
//   nf4_decode<N>(codes, t, out)     N = 32 or 64 elements of one block (N / 2 bytes) as N / width registers, in order
//   nf4_decode_n<N>(codes, n, t, out)   the first n of them: reads (n + 1) / 2 bytes, the rest are zeros of either sign
//   Nf4Words<T>::store, widen        the same N elements by way of memory, as operands of Dot<T>
//
// Every block begins at a multiple of 32 elements of its row, so groups of 32 never see two tables.

alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

#if SWIFTK_ISA > 0
// A bf16 absmax is one of 256 low bytes (significand, last bit of the exponent) times 2^(2 n), and powers of two commute with
// both roundings unless a product is subnormal. So the values for each low byte are looked up and n is added to the high bytes:
// 2.8 ns a block of 64 with its decoding, the products 4.1 ns (Zen 3, in the L1 cache). Code 7 is 0 and stays it.
struct Nf4Rows {
#if SWIFTK_ISA == 2
  alignas(64) uint16_t word[256][16];
#else
  alignas(64) uint8_t low[256][16], high[256][16];
#endif
};
constexpr Nf4Rows nf4_rows() {
  Nf4Rows rows{};
  for (uint32_t low = 0; low < 256; ++low)
    for (int i = 0; i < 16; ++i) {
      const uint32_t u = __builtin_bit_cast(uint32_t, kNf4[i] * __builtin_bit_cast(float, (0x4000 | low) << 16));
      const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, word = i == 7 ? 0 : (rounded - 0x4000) & 0xffff;
#if SWIFTK_ISA == 2
      rows.word[low][i] = uint16_t(word);
#else
      rows.low[low][i] = uint8_t(word), rows.high[low][i] = uint8_t(word >> 8);
#endif
    }
  return rows;
}
constexpr Nf4Rows kNf4Rows = nf4_rows();
// positive, finite, and at least 2^-121: the least value but 0 is 2^-3.7 of it
inline bool nf4_is_plain(bf16 absmax) { return unsigned(absmax.bits) - 0x0300u < 0x7f80u - 0x0300u; }
#endif

#if SWIFTK_ISA == 2

struct Nf4Table {
  __m512i v;  // the 16 values twice: bit 4 of an index does not matter
  static Nf4Table make(float absmax) {
    return {_mm512_broadcast_i64x4((Vec<float>::load(kNf4) * Vec<float>::set1(absmax)).to_bf16())};
  }
  static Nf4Table make(bf16 absmax) {
    if (__builtin_expect(!nf4_is_plain(absmax), 0)) return make(float(absmax));
    const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Rows.word[absmax.bits & 255]));
    const __m256i but7 = _mm256_setr_epi16(-1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi16(int16_t(absmax.bits & 0xff00)), but7);
    return {_mm512_broadcast_i64x4(_mm256_add_epi16(row, high))};
  }
};
template <int N> inline void nf4_decode(const uint8_t* codes, const Nf4Table& t, Vec<bf16> (&out)[N / 32]) {
  for (int i = 0; i < N / 32; ++i) {
    const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
    out[i].v = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(c, 4), _mm512_slli_epi32(c, 16)), t.v);
  }
}

#elif SWIFTK_ISA == 1

struct Nf4Table {
  __m256i low, high;  // the low and the high bytes of the 16 values, in both lanes
  static Nf4Table make(float absmax) {
    const __m256 a = _mm256_set1_ps(absmax);
    auto rounded = [](__m256 x) {  // bf16 in the upper half; x is finite
      const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    };
    const __m256 even = _mm256_setr_ps(kNf4[0], kNf4[2], kNf4[4], kNf4[6], kNf4[8], kNf4[10], kNf4[12], kNf4[14]);
    const __m256 odd = _mm256_setr_ps(kNf4[1], kNf4[3], kNf4[5], kNf4[7], kNf4[9], kNf4[11], kNf4[13], kNf4[15]);
    const __m256i e = rounded(_mm256_mul_ps(even, a)), o = rounded(_mm256_mul_ps(odd, a));
    const __m256i split = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i w = _mm256_shuffle_epi8(_mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xaa), split);
    return {_mm256_permute4x64_epi64(w, 0x88), _mm256_permute4x64_epi64(w, 0xdd)};
  }
  static Nf4Table make(bf16 absmax) {
    if (__builtin_expect(!nf4_is_plain(absmax), 0)) return make(float(absmax));
    auto row = [&](const uint8_t (&rows)[256][16]) {
      return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(rows[absmax.bits & 255])));
    };
    const __m256i but7 = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i high = _mm256_and_si256(_mm256_set1_epi8(char(absmax.bits >> 8)), but7);
    return {row(kNf4Rows.low), _mm256_add_epi8(row(kNf4Rows.high), high)};
  }
};
// Nibbles in order, then their low and high bytes, then words. The unpacks work in each half of a register by itself: the
// 4-byte groups of the codes are dealt out to the halves in turn, so that the words are in order.
template <int N> inline void nf4_decode(const uint8_t* codes, const Nf4Table& t, Vec<bf16> (&out)[N / 16]) {
  static_assert(N == 32 || N == 64);
  __m256i c;
  if constexpr (N == 64) c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  else c = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  c = _mm256_permutevar8x32_epi32(c, N == 64 ? _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7) : _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3));
  const __m256i nibble = _mm256_set1_epi8(15), e = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble), o = _mm256_and_si256(c, nibble);
  auto put = [&](__m256i nibbles, Vec<bf16>* to) {
    const __m256i low = _mm256_shuffle_epi8(t.low, nibbles), high = _mm256_shuffle_epi8(t.high, nibbles);
    to[0].v = _mm256_unpacklo_epi8(low, high), to[1].v = _mm256_unpackhi_epi8(low, high);
  };
  put(_mm256_unpacklo_epi8(e, o), out);
  if constexpr (N == 64) put(_mm256_unpackhi_epi8(e, o), out + 2);
}

#else

struct Nf4Table {
  bf16 v[16];
  static Nf4Table make(float absmax) {
    Nf4Table t;
    for (int i = 0; i < 16; ++i) t.v[i] = bf16(kNf4[i] * absmax);
    return t;
  }
  static Nf4Table make(bf16 absmax) { return make(float(absmax)); }
};
template <int N> inline void nf4_decode(const uint8_t* codes, const Nf4Table& t, Vec<bf16> (&out)[N / Vec<bf16>::width]) {
  constexpr int W = Vec<bf16>::width;
  for (int i = 0; i < N / W; ++i)
    for (int j = 0; j < W / 2; ++j, ++codes) out[i].v[2 * j] = t.v[*codes >> 4], out[i].v[2 * j + 1] = t.v[*codes & 15];
}

#endif

template <int N> inline void nf4_decode_n(const uint8_t* codes, int n, const Nf4Table& t, Vec<bf16> (&out)[N / Vec<bf16>::width]) {
  alignas(32) uint8_t tail[N / 2];
  std::memset(tail, 0x77, sizeof(tail));  // code 7 is 0
  std::memcpy(tail, codes, size_t(n + 1) / 2);
  if (n % 2) tail[n / 2] = uint8_t((tail[n / 2] & 0xf0) | 7);
  nf4_decode<N>(tail, t, out);
}

// The words of 32 or 64 elements in memory on their way to Dot<T>: `store`, then `widen` of `step` of them at a time.
template <class T> struct Nf4Words {
  using D = Dot<T>;
  static constexpr int step = D::step, parts = D::parts;
  template <int N> static void store(const uint8_t* codes, const Nf4Table& t, bf16* words) {
    Vec<bf16> u[N / Vec<bf16>::width];
    nf4_decode<N>(codes, t, u);
    for (int i = 0; i < N / Vec<bf16>::width; ++i) u[i].store(words + i * Vec<bf16>::width);
  }
  static void widen(const bf16* words, Vec<typename D::P> (&x)[parts]) {
    if constexpr (std::is_same_v<T, float>) x[0] = Vec<float>::load(words);
    else D::load(words, x);
  }
};
#if SWIFTK_ISA == 1
// fp32 lanes without a widening shuffle: the codes are dealt out so that dword l of 16 words holds elements l and l + 8, and
// like those of Dot<bf16> they are a shift and a mask away from their lanes.
template <> struct Nf4Words<float> {
  static constexpr int step = 16, parts = 2;
  template <int N> static void store(const uint8_t* codes, const Nf4Table& t, bf16* words) {
    // even lanes are high nibbles; bytes 0 to 3 and 8 to 11 make lanes 0 to 3 (4 to 7) of the first 16 words, the others the next
    const __m256i deal = _mm256_setr_epi8(0, 4, 0, 4, 1, 5, 1, 5, 8, 12, 8, 12, 9, 13, 9, 13,  //
                                          2, 6, 2, 6, 3, 7, 3, 7, 10, 14, 10, 14, 11, 15, 11, 15);
#pragma GCC unroll 2
    for (int i = 0; i < N / 32; ++i) {
      const __m256i c = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i));
      const __m256i dealt = _mm256_shuffle_epi8(c, deal);
      const __m256i nibbles = _mm256_and_si256(_mm256_blend_epi16(_mm256_srli_epi16(dealt, 4), dealt, 0xaa), _mm256_set1_epi8(15));
      const __m256i low = _mm256_shuffle_epi8(t.low, nibbles), high = _mm256_shuffle_epi8(t.high, nibbles);
      Vec<bf16>{_mm256_unpacklo_epi8(low, high)}.store(words + 32 * i);
      Vec<bf16>{_mm256_unpackhi_epi8(low, high)}.store(words + 32 * i + 16);
    }
  }
  static void widen(const bf16* words, Vec<float> (&x)[2]) { Dot<bf16>::load(words, x); }
};
#endif
