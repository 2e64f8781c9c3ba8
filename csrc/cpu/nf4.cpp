#include <type_traits>

#define SWIFTK_BODY "cpu/nf4.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

#include "cuda/nf4_args.h"

namespace swiftk {

// The bodies of csrc/cuda/nf4.cu, thread after thread: what a GPU computes, for machines without one.
template <int kind> void dequantize_on_host(const gpu::Nf4Dequantize& a, bool wide) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = gpu::nf4_value(i);
  for (int64_t block = 0; block < a.blocks(); ++block)
    for (int thread = 0; thread < gpu::kDequantizeThreads; ++thread) {
      if (wide) gpu::nf4_dequantize_thread<kind, float>(a, block, thread, values);
      else gpu::nf4_dequantize_thread<kind, uint16_t>(a, block, thread, values);
    }
}

template <class T> int64_t quantize_on_host(const gpu::Nf4Quantize& a) {
  int64_t bad = -1;
  for (int64_t block = 0; block < a.blocks(); ++block) {
    uint32_t largest = 0;
    for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, gpu::nf4_largest_of_lane<T>(a, block, lane));
    for (int lane = 0; lane < 32; ++lane) gpu::nf4_codes_of_lane<T>(a, block, lane, largest);
    if (bad < 0 && largest >= gpu::kInfinity) bad = block;
  }
  return bad;
}

void bind_nf4(py::module_& m) {
  m.def(
      "nf4_quantize",
      [](int dtype, uintptr_t x, int64_t ldx, int64_t rows, int64_t cols, int64_t blocksize, uintptr_t codes, int absmax_dtype,
         uintptr_t absmax, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        int64_t bad = -1;
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          auto run = [&](auto s) {
            using S = decltype(s);
            SWIFTK_DISPATCH(path, nf4_quantize(pointer<const T>(x), ldx, rows, cols, blocksize, pointer<uint8_t>(codes),
                                               pointer<S>(absmax), threads, bad));
          };
          if (absmax_dtype == kBFloat16) run(bf16{});
          else run(float{});
        });
        return bad;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nf4_dequantize",
      [](uintptr_t codes, int64_t ld_codes, int absmax_dtype, uintptr_t absmax, int64_t ld_absmax, int64_t rows, int64_t cols,
         int64_t blocksize, int dtype, uintptr_t out, int64_t ld_out, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        auto run = [&](auto s, auto o) {
          using S = decltype(s);
          using O = decltype(o);
          SWIFTK_DISPATCH(path, nf4_dequantize(pointer<const uint8_t>(codes), ld_codes, pointer<const S>(absmax), ld_absmax, rows,
                                               cols, blocksize, pointer<O>(out), ld_out, threads));
        };
        auto with_absmax = [&](auto o) { absmax_dtype == kBFloat16 ? run(bf16{}, o) : run(float{}, o); };
        dtype == kBFloat16 ? with_absmax(bf16{}) : with_absmax(float{});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("nf4_dequantize_as_on_gpu", [](uintptr_t codes, int64_t ld_codes, const gpu::ScaleArgs& scales, int64_t rows, int64_t cols,
                                       int64_t blocksize, bool wide, uintptr_t out, int64_t ld_out) {
    const auto a = gpu::dequantize_args(codes, ld_codes, scales, rows, cols, blocksize, wide, out, ld_out);
    switch (std::get<0>(scales)) {
      case gpu::kScaleBf16: return dequantize_on_host<gpu::kScaleBf16>(a, wide);
      case gpu::kScaleFp32: return dequantize_on_host<gpu::kScaleFp32>(a, wide);
      default: return dequantize_on_host<gpu::kScaleNested>(a, wide);
    }
  });
  m.def("nf4_quantize_as_on_gpu", [](int dtype, uintptr_t x, int64_t ldx, int64_t rows, int64_t cols, int64_t blocksize,
                                     uintptr_t codes, bool narrow, uintptr_t absmax) {
    const auto a = gpu::quantize_args(x, ldx, rows, cols, blocksize, codes, narrow, absmax);
    return dtype == kBFloat16 ? quantize_on_host<uint16_t>(a) : dtype == kFloat32 ? quantize_on_host<float>(a) : quantize_on_host<double>(a);
  });
  m.def("nf4_decode_as_on_gpu", [](uintptr_t codes, int64_t words, float absmax, uintptr_t out) {
    const auto planes = gpu::nf4_planes(absmax);
    for (int64_t i = 0; i < words; ++i) gpu::nf4_decode8(pointer<const uint32_t>(codes)[i], planes, pointer<uint32_t>(out) + 4 * i);
  });
}

}  // namespace swiftk
