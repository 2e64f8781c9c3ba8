// Which instruction set a call runs on: chosen at run time, forced by the `isa` argument of every native call.
#pragma once

#include <stdexcept>
#include <string>

namespace swiftk {

enum class Isa { portable, avx2, avx512 };  // avx2 = AVX2, FMA, BMI2; avx512 = these and AVX-512 F, BW, DQ, VL, BF16

inline bool supported(Isa isa) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(SWIFTK_EMULATE_AVX512)
  static const bool has_avx512 = has_avx2;  // emulate_avx512.h
#else
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::portable || (isa == Isa::avx2 && has_avx2) || (isa == Isa::avx512 && has_avx512);
#else
  return isa == Isa::portable;
#endif
}

inline Isa best_isa() {
#if !defined(SWIFTK_EMULATE_AVX512)
  if (supported(Isa::avx512)) return Isa::avx512;
#endif
  return supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

// "auto" | "avx512" | "avx2" | "portable"; asking for one that this CPU lacks is an error, never a slower path.
inline Isa resolve_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  Isa isa;
  if (name == "avx512") isa = Isa::avx512;
  else if (name == "avx2") isa = Isa::avx2;
  else if (name == "portable") isa = Isa::portable;
  else throw std::invalid_argument("isa has '" + name + "', wants auto, avx512, avx2 or portable");
  if (!supported(isa)) throw std::invalid_argument("isa has '" + name + "', which this CPU does not support; wants auto");
  return isa;
}

}  // namespace swiftk
