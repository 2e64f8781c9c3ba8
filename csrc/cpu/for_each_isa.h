// Compiles one kernel body once per instruction set:
//
//   #define SWIFTK_BODY "cpu/rms_norm.inc"
//   #include "cpu/for_each_isa.h"
//
// puts the body into namespaces swiftk::portable, swiftk::avx2 and swiftk::avx512, each under its own target pragma
// and with its own `Vec` (vec.h). The body must define everything it uses inside that namespace (so that no wide code
// leaks through a shared template) and call only functions of vec.h, types.h and the C library. It sits in an unnamed
// namespace: two sources may each have their own `pack<T>`, and the linker never merges them.
// SWIFTK_ISA is 0, 1 or 2 inside the body. SWIFTK_DISPATCH(isa, call) runs `call` in the namespace of `isa`.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(SWIFTK_EMULATE_AVX512)
#include "cpu/emulate_avx512.h"
#endif

#define SWIFTK_ISA 0
namespace swiftk::portable {
namespace {
#include "cpu/vec.h"
#include SWIFTK_BODY
}  // namespace
}  // namespace swiftk::portable
#undef SWIFTK_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define SWIFTK_ISA 1
namespace swiftk::avx2 {
namespace {
#include "cpu/vec.h"
#include SWIFTK_BODY
}  // namespace
}  // namespace swiftk::avx2
#undef SWIFTK_ISA
#pragma GCC pop_options

#pragma GCC push_options
#if !defined(SWIFTK_EMULATE_AVX512)
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define SWIFTK_ISA 2
namespace swiftk::avx512 {
namespace {
#include "cpu/vec.h"
#include SWIFTK_BODY
}  // namespace
}  // namespace swiftk::avx512
#undef SWIFTK_ISA
#pragma GCC pop_options

#define SWIFTK_DISPATCH(isa, call)              \
  do {                                          \
    switch (isa) {                              \
      case Isa::avx512: avx512::call; break;    \
      case Isa::avx2: avx2::call; break;        \
      case Isa::portable: portable::call; break; \
    }                                           \
  } while (0)
#else
#define SWIFTK_DISPATCH(isa, call) portable::call
#endif
