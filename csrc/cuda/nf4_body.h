// What one thread of nf4_dequantize and one lane of nf4_quantize do, as functions of their indices: csrc/cuda/nf4.cu runs them in
// a grid, csrc/cpu/nf4.cpp one after another for the tests.
#pragma once

#include "cuda/nf4_arith.h"

namespace swiftk::gpu {

// --- dequantize ------------------------------------------------------------------------------------------------------------------

// A block of threads takes 2048 elements of each of four rows; a thread eight neighbours of each: 4-byte loads, 16-byte stores,
// both without gaps over a warp. (16-byte loads would leave a thread with 64 bytes to store, and a warp's stores with gaps.)
// The tuning is reasoned, not measured: no GPU has run it.
constexpr int kDequantizeThreads = 256, kDequantizeRows = 4, kDequantizeColumns = 8 * kDequantizeThreads;

struct Nf4Dequantize {
  const uint8_t* codes;
  int64_t ld_codes;
  Nf4Scales scales;
  int64_t rows, cols;
  int shift;  // blocksize = 1 << shift
  void* out;
  int64_t ld_out;
  bool words, vectors;  // every row of codes begins at 4 bytes, of out at 16

  SWIFTK_HD uint32_t segments() const { return uint32_t((cols + kDequantizeColumns - 1) / kDequantizeColumns); }
  SWIFTK_HD int64_t blocks() const { return (rows + kDequantizeRows - 1) / kDequantizeRows * segments(); }
};

// The codes of elements k to k + 7 of a row byte by byte, those past its end as code 7, which is 0.
SWIFTK_HD uint32_t nf4_codes8(const uint8_t* row, int64_t k, int64_t cols) {
  const uint8_t* from = row + k / 2;
  uint32_t codes = 0x77777777;
  for (int j = 0; j < 4; ++j)
    if (k + 2 * j < cols) codes = (codes & ~(255u << 8 * j)) | uint32_t(from[j]) << 8 * j;
  if ((cols & 1) && k < cols && k + 8 > cols) {  // the pad nibble of an odd row is anything
    const int at = int(cols / 2 - k / 2) * 8;
    codes = (codes & ~(15u << at)) | 7u << at;
  }
  return codes;
}

// 16 and 8 bytes at a time, by the types that nvcc makes one instruction of; addresses are multiples of as many.
struct alignas(16) Vector16 {
  uint32_t word[4];
};

SWIFTK_HD Vector16 load16(const void* from) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
#else
  return *static_cast<const Vector16*>(from);
#endif
}
SWIFTK_HD void load8(const void* from, uint32_t* to) {
#if defined(__CUDA_ARCH__)
  const uint2 v = __ldg(static_cast<const uint2*>(from));
  to[0] = v.x, to[1] = v.y;
#else
  memcpy(to, from, 8);
#endif
}
SWIFTK_HD void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  __stwb(static_cast<uint4*>(to), make_uint4(a, b, c, d));
#else
  *static_cast<Vector16*>(to) = {{a, b, c, d}};
#endif
}

SWIFTK_HD void nf4_store8(uint16_t* to, const float* x, int n, bool vectors) {
  uint32_t pairs[4];
  SWIFTK_UNROLL
  for (int j = 0; j < 4; ++j) pairs[j] = pack_bf16(x[2 * j], x[2 * j + 1]);
  if (vectors && n == 8) return store16(to, pairs[0], pairs[1], pairs[2], pairs[3]);
  SWIFTK_UNROLL
  for (int j = 0; j < 8; ++j)
    if (j < n) to[j] = uint16_t(pairs[j / 2] >> 16 * (j % 2));
}
SWIFTK_HD void nf4_store8(float* to, const float* x, int n, bool vectors) {
  if (vectors && n == 8) {
    store16(to, bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
    store16(to + 4, bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7]));
    return;
  }
  SWIFTK_UNROLL
  for (int j = 0; j < 8; ++j)
    if (j < n) to[j] = x[j];
}

// values: the 16 values in shared memory. They lie in 16 banks, so no two lanes wait for each other; a look-up and a product an
// element leave the memory as the limit (2.6 bytes an element), and fp32 is there unrounded.
template <int kind, class O> SWIFTK_HD void nf4_dequantize_thread(const Nf4Dequantize& a, int64_t block, int thread, const float* values) {
  const uint32_t segment = uint32_t(block) % a.segments();
  const int64_t row = int64_t(uint32_t(block) / a.segments()) * kDequantizeRows;
  const int64_t k = int64_t(segment) * kDequantizeColumns + 8 * thread;
  if (k >= a.cols) return;
  uint32_t codes[kDequantizeRows];
  float absmax[kDequantizeRows];
  int64_t rows[kDequantizeRows];  // the last one again where there are fewer: the loads have no branch between them
  SWIFTK_UNROLL
  for (int i = 0; i < kDequantizeRows; ++i) rows[i] = row + i < a.rows ? row + i : a.rows - 1;
  if (a.words && k + 8 <= a.cols) {
    SWIFTK_UNROLL
    for (int i = 0; i < kDequantizeRows; ++i) codes[i] = *reinterpret_cast<const uint32_t*>(a.codes + rows[i] * a.ld_codes + k / 2);
  } else {
    SWIFTK_UNROLL
    for (int i = 0; i < kDequantizeRows; ++i) codes[i] = nf4_codes8(a.codes + rows[i] * a.ld_codes, k, a.cols);
  }
  SWIFTK_UNROLL
  for (int i = 0; i < kDequantizeRows; ++i) absmax[i] = nf4_scale<kind>(a.scales, rows[i], k >> a.shift);
  const int n = a.cols - k < 8 ? int(a.cols - k) : 8;
  SWIFTK_UNROLL
  for (int i = 0; i < kDequantizeRows; ++i) {
    if (row + i >= a.rows) break;
    float x[8];
    SWIFTK_UNROLL
    for (int j = 0; j < 4; ++j) {
      x[2 * j] = mul(values[codes[i] >> (8 * j + 4) & 15], absmax[i]);
      x[2 * j + 1] = mul(values[codes[i] >> 8 * j & 15], absmax[i]);
    }
    nf4_store8(static_cast<O*>(a.out) + (row + i) * a.ld_out + k, x, n, a.vectors);
  }
}

// --- quantize --------------------------------------------------------------------------------------------------------------------

// A warp takes an NF4 block, lane l its bytes l, l + 32, ...
struct Nf4Quantize {
  const void* x;
  int64_t ldx, rows, cols;
  int shift;
  uint8_t* codes;  // (rows, (cols + 1) / 2)
  void* absmax;    // (rows, blocks of a row), bf16 or fp32
  bool narrow;     // bf16

  SWIFTK_HD int64_t row_blocks() const { return (cols + (int64_t(1) << shift) - 1) >> shift; }
  SWIFTK_HD int64_t blocks() const { return rows * row_blocks(); }
};

template <class T> SWIFTK_HD uint32_t nf4_largest_of_lane(const Nf4Quantize& a, int64_t block, int lane) {
  const int64_t row = block / a.row_blocks(), first = (block % a.row_blocks()) << a.shift;
  const T* x = static_cast<const T*>(a.x) + row * a.ldx;
  uint32_t largest = 0;
  for (int64_t k = first + 2 * lane; k < first + (int64_t(1) << a.shift); k += 64)
    for (int64_t i = k; i < k + 2 && i < a.cols; ++i) {
      const uint32_t m = magnitude(widen(x[i]));
      largest = m > largest ? m : largest;
    }
  return largest;
}

template <class T> SWIFTK_HD void nf4_codes_of_lane(const Nf4Quantize& a, int64_t block, int lane, uint32_t largest) {
  const int64_t row = block / a.row_blocks(), first = (block % a.row_blocks()) << a.shift;
  const T* x = static_cast<const T*>(a.x) + row * a.ldx;
  const float absmax = nf4_absmax(largest), inverse = nf4_inverse(absmax);
  for (int64_t k = first + 2 * lane; k < first + (int64_t(1) << a.shift) && k < a.cols; k += 64) {
    const float last = k + 1 < a.cols ? widen(x[k + 1]) : 0;  // the pad nibble is 7, the code of 0
    a.codes[row * ((a.cols + 1) / 2) + k / 2] = uint8_t(nf4_code(mul(widen(x[k]), inverse)) << 4 | nf4_code(mul(last, inverse)));
  }
  if (lane != 0) return;
  if (a.narrow) static_cast<uint16_t*>(a.absmax)[block] = uint16_t(pack_bf16(absmax, 0) & 0xffff);
  else static_cast<float*>(a.absmax)[block] = absmax;
}

}  // namespace swiftk::gpu
