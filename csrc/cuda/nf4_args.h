// The arguments of the bodies in nf4_body.h, from the addresses and sizes that kernels/nf4.py gives to either module.
#pragma once

#include <tuple>

#include "cuda/nf4_body.h"

namespace swiftk::gpu {

using ScaleArgs = std::tuple<int, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;  // kind, then Nf4Scales

inline int log2_of(int64_t blocksize) {
  int shift = 5;
  while (int64_t(1) << shift < blocksize) ++shift;
  return shift;
}
inline Nf4Scales scales_of(const ScaleArgs& s) {
  return {reinterpret_cast<const void*>(std::get<1>(s)), std::get<2>(s), reinterpret_cast<const float*>(std::get<3>(s)),
          reinterpret_cast<const float*>(std::get<4>(s)), reinterpret_cast<const float*>(std::get<5>(s))};
}
inline Nf4Dequantize dequantize_args(uintptr_t codes, int64_t ld_codes, const ScaleArgs& scales, int64_t rows, int64_t cols,
                                     int64_t blocksize, bool wide, uintptr_t out, int64_t ld_out) {
  const bool words = codes % 4 == 0 && ld_codes % 4 == 0, vectors = out % 16 == 0 && ld_out * (wide ? 4 : 2) % 16 == 0;
  return {reinterpret_cast<const uint8_t*>(codes), ld_codes, scales_of(scales), rows, cols, log2_of(blocksize),
          reinterpret_cast<void*>(out), ld_out, words, vectors};
}
inline Nf4Quantize quantize_args(uintptr_t x, int64_t ldx, int64_t rows, int64_t cols, int64_t blocksize, uintptr_t codes,
                                 bool narrow, uintptr_t absmax) {
  return {reinterpret_cast<const void*>(x), ldx, rows, cols, log2_of(blocksize), reinterpret_cast<uint8_t*>(codes),
          reinterpret_cast<void*>(absmax), narrow};
}

}  // namespace swiftk::gpu
