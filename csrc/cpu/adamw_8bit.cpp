#include <cstdint>

namespace swiftk {

constexpr int64_t kBlock = 256;
constexpr uint8_t kZeroCode = 127;  // of the signed map

struct AdamTensor {  // a row of kernels/adamw_8bit.py's table
  int64_t p, g, m, v, absmax1, absmax2;  // addresses; absmax1 0: m and v are fp32
  int64_t size, first_block, dtype;
};

struct Rates {
  float decay, beta1, grad1, beta2, grad2, step_size, root_scale, eps;  // grad1 = 1 - beta1, root_scale = 1 / sqrt(1 - beta2^t)
};

// A code is the number of thresholds (the middles of neighbouring values of the map) below x. A bucket is the top of x's bit
// pattern, the exponent and some bits of the fraction, and holds at most one threshold. `edges` has for each bucket the code at
// its start in the top 8 bits and below it what makes the rest of x's pattern carry into them past the threshold.
struct Code {
  const float* map;       // 256 values, ascending
  const uint32_t* edges;  // of the buckets from `first` on; signed: `negative` further on for negative x
  const float* lines;     // of the avx2 path, see adamw_8bit.inc: rows of 8
  int32_t first, negative, decades;
};
constexpr int kShiftSigned = 17, kShiftUnsigned = 16;  // 64 and 128 buckets an octave: 0.0078 and 0.0039 wide below 1, where
                                                       // neighbouring values are 0.0141 and 0.0070 apart

}  // namespace swiftk

#define SWIFTK_BODY "cpu/adamw_8bit.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

using CodeArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, int32_t>;  // the members of Code
static Code code_of(const CodeArgs& args) {
  const auto& [map, edges, lines, first, negative, decades] = args;
  return {pointer<const float>(map), pointer<const uint32_t>(edges), pointer<const float>(lines), first, negative, decades};
}

void bind_adamw_8bit(py::module_& m) {
  m.def(
      "adamw_8bit",
      [](uintptr_t tensors, uintptr_t rates, int64_t count, const CodeArgs& signed_code, const CodeArgs& unsigned_code, int threads,
         const std::string& isa) {
        const Code code1 = code_of(signed_code), code2 = code_of(unsigned_code);
        auto run = [&](auto f) { f(pointer<const AdamTensor>(tensors), pointer<const Rates>(rates), count, code1, code2, threads); };
        if (resolve_isa(isa) == Isa::portable) return run(portable::adamw_8bit);
#if defined(__x86_64__)
        run(avx2::adamw_8bit);  // avx512 too
#endif
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
