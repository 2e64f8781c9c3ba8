// The arguments of the bodies in nf4_body.h, from the addresses and sizes that kernels/nf4.py gives to either module.
#pragma once

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/nf4_linear_dx_body.h"

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


using RowArgs = std::tuple<uintptr_t, int64_t>;  // address, row stride
// codes, absmax, blocksize, s, t, rank, scale, bias, y, N
using ProductArgs = std::tuple<RowArgs, ScaleArgs, int64_t, RowArgs, RowArgs, int, uintptr_t, uintptr_t, RowArgs, int64_t>;

// Whether every row begins at a multiple of `to` bytes.
inline bool aligned(const RowArgs& rows, int itemsize, int to) { return std::get<0>(rows) % to == 0 && std::get<1>(rows) * itemsize % to == 0; }

inline Nf4Linear linear_args(const RowArgs& x, int64_t M, int64_t K, bool wide, const std::vector<ProductArgs>& products) {
  if (products.size() > size_t(kMaxProducts)) throw std::invalid_argument("nf4_linear: too many products in one launch");
  if (K > int64_t(1) << 30) throw std::invalid_argument("nf4_linear: K has more than 2^30 elements");
  Nf4Linear a{reinterpret_cast<const uint16_t*>(std::get<0>(x)), std::get<1>(x), M, int(K), wide, int(products.size()), {}};
  for (size_t i = 0; i < products.size(); ++i) {
    const auto& [codes, scales, blocksize, s, t, rank, scale, bias, y, N] = products[i];
    a.product[i] = {reinterpret_cast<const uint8_t*>(std::get<0>(codes)), std::get<1>(codes), scales_of(scales), std::get<0>(scales),
                    log2_of(blocksize), aligned(codes, 1, 16), reinterpret_cast<const uint16_t*>(std::get<0>(s)),
                    reinterpret_cast<const uint16_t*>(std::get<0>(t)), std::get<1>(s), std::get<1>(t), rank,
                    reinterpret_cast<const float*>(scale), reinterpret_cast<const uint16_t*>(bias),
                    reinterpret_cast<void*>(std::get<0>(y)), std::get<1>(y), N};
  }
  return a;
}

inline Nf4LinearDx linear_dx_args(const RowArgs& dy, int64_t M, int64_t N, int64_t K, const RowArgs& codes, const ScaleArgs& scales,
                                  int64_t blocksize, int splits, uintptr_t out) {
  return {reinterpret_cast<const uint16_t*>(std::get<0>(dy)), std::get<1>(dy), M, N, K,
          reinterpret_cast<const uint8_t*>(std::get<0>(codes)), std::get<1>(codes), scales_of(scales), std::get<0>(scales),
          log2_of(blocksize), aligned(codes, 1, 8), splits, reinterpret_cast<float*>(out)};
}

}  // namespace swiftk::gpu
