// The arithmetic of NF4 on a GPU (kernels/nf4.py has the specification), as functions that the host can run too: csrc/cpu/nf4.cpp
// compiles them into _swiftk_C, and the CPU tests hold them to the golden vectors. One rounding per operation, subnormals kept.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SWIFTK_HD __host__ __device__ __forceinline__
#else
#define SWIFTK_HD inline
#endif
#if defined(__CUDA_ARCH__)
#define SWIFTK_UNROLL _Pragma("unroll")
#define SWIFTK_LOOP _Pragma("unroll 1")
#else
#define SWIFTK_UNROLL
#define SWIFTK_LOOP
#endif

namespace swiftk::gpu {

SWIFTK_HD uint32_t bits_of(float value) {
  uint32_t u;
  memcpy(&u, &value, 4);
  return u;
}
SWIFTK_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Products and sums that no compiler fuses.
SWIFTK_HD float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SWIFTK_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
SWIFTK_HD float reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(a);
#else
  return 1.0f / a;
#endif
}

SWIFTK_HD float widen(uint16_t bf16) { return float_of(uint32_t(bf16) << 16); }
SWIFTK_HD float widen(float x) { return x; }
SWIFTK_HD float widen(double x) { return float(x); }

// Two floats as bf16, the first in the lower half; to nearest even, subnormals kept, NaN becomes 0x7fff.
SWIFTK_HD uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  auto half = [](float x) { return x != x ? 0x7fffu : (bits_of(x) + 0x7fff + (bits_of(x) >> 16 & 1)) >> 16; };
  return half(low) | half(high) << 16;
#endif
}

// Byte i of the result is byte (nibble i of selector) of the eight bytes a, b: PRMT, for selectors of 0 to 7.
SWIFTK_HD uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
#endif
}

SWIFTK_HD constexpr float nf4_value(int code) {
  constexpr float values[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                                -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                                0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                0.7229568362236023f, 1.0f};
  return values[code];
}

// The code of v: the number of thresholds below it.
SWIFTK_HD uint32_t nf4_code(float v) {
  uint32_t code = 0;
  SWIFTK_UNROLL
  for (int i = 0; i < 15; ++i) code += v > (nf4_value(i) + nf4_value(i + 1)) / 2;
  return code;
}

// --- absmax ----------------------------------------------------------------------------------------------------------------------

enum ScaleKind : int { kScaleBf16 = 0, kScaleFp32 = 1, kScaleNested = 2 };

// Where the absmax of blocks come from: (rows, blocks) with a row stride. Nested: codes of a map, in blocks of 256 over the
// flattened matrix, whose rows are `ld` apart.
struct Nf4Scales {
  const void* data;
  int64_t ld;
  const float *code_map, *absmax, *offset;  // nested only
};

template <int kind> SWIFTK_HD float nf4_scale(const Nf4Scales& s, int64_t row, int64_t block) {
  const int64_t i = row * s.ld + block;
  if constexpr (kind == kScaleBf16) return widen(static_cast<const uint16_t*>(s.data)[i]);
  if constexpr (kind == kScaleFp32) return static_cast<const float*>(s.data)[i];
  if constexpr (kind == kScaleNested)
    return add(mul(s.code_map[static_cast<const uint8_t*>(s.data)[i]], s.absmax[i >> 8]), *s.offset);
  return 0;
}

constexpr uint32_t kInfinity = 0x7f800000, kSmallestNormal = 0x00800000;  // as bits of |x|: whatever is not finite is the largest

SWIFTK_HD uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }

// What a block's largest magnitude becomes: 0 below 2^-126, NaN where it is not finite, and what the elements are multiplied by.
SWIFTK_HD float nf4_absmax(uint32_t largest) {
  if (largest >= kInfinity) return float_of(0x7fffffff);
  return largest < kSmallestNormal ? 0 : float_of(largest);
}
SWIFTK_HD float nf4_inverse(float absmax) { return absmax == 0 ? 0 : reciprocal(absmax); }

// --- decoding eight codes to bf16 -------------------------------------------------------------------------------------------------

// A block's 16 values, bf16(value * absmax), as two planes of 16 bytes: one PRMT looks four codes up in half a plane.
struct Nf4Planes {
  uint32_t low[4], high[4];
};

SWIFTK_HD Nf4Planes nf4_planes(float absmax) {
  Nf4Planes t;
  SWIFTK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = pack_bf16(mul(nf4_value(4 * i), absmax), mul(nf4_value(4 * i + 1), absmax));
    const uint32_t b = pack_bf16(mul(nf4_value(4 * i + 2), absmax), mul(nf4_value(4 * i + 3), absmax));
    t.low[i] = byte_permute(a, b, 0x6420), t.high[i] = byte_permute(a, b, 0x7531);
  }
  return t;
}

// Four bytes of codes -> eight elements, in order, two a word. Bits 0 to 2 of a code look up in both halves of a plane, bit 3
// takes one of them: 21 integer instructions, 2.6 an element.
SWIFTK_HD void nf4_decode8(uint32_t codes, const Nf4Planes& t, uint32_t* out) {
  const uint32_t within = codes & 0x77777777, half = 0x32103210 | (codes >> 1 & 0x44444444);
  SWIFTK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = within >> 16 * i, which = half >> 16 * i;
    const uint32_t low = byte_permute(byte_permute(t.low[0], t.low[1], at), byte_permute(t.low[2], t.low[3], at), which);
    const uint32_t high = byte_permute(byte_permute(t.high[0], t.high[1], at), byte_permute(t.high[2], t.high[3], at), which);
    out[2 * i] = byte_permute(low, high, 0x4051);  // a byte's upper nibble is the earlier element
    out[2 * i + 1] = byte_permute(low, high, 0x6273);
  }
}

}  // namespace swiftk::gpu
