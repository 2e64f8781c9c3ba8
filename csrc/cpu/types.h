// Element types of the native calls and the precision each one accumulates in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace swiftk {

// bfloat16: the upper half of a float. Conversion rounds to nearest even; NaN stays NaN; subnormals are kept.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    bits = value != value ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

template <class T> struct Accumulate { using type = T; };
template <> struct Accumulate<bf16> { using type = float; };
template <class T> using acc_t = typename Accumulate<T>::type;  // float for bf16 and float, double for double

// dtype codes shared with kernels/_native.py
enum Dtype : int { kBFloat16 = 0, kFloat32 = 1, kFloat64 = 2 };

// Calls f(T{}) with the C++ type of a dtype code.
template <class F> void dispatch_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kBFloat16: f(bf16{}); break;
    case kFloat32: f(float{}); break;
    case kFloat64: f(double{}); break;
    default: throw std::invalid_argument("dtype code has " + std::to_string(dtype) + ", wants 0 (bf16), 1 (fp32) or 2 (fp64)");
  }
}

template <class T> inline T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace swiftk
