#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/linear.h"

#define SWIFTK_BODY "cpu/linear.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

#include "cuda/nf4_args.h"

namespace swiftk {

// The bodies of csrc/cuda/nf4_linear.cu, block after block, warp after warp: what a GPU computes, for machines without one. The sums
// within one instruction, whose order the hardware keeps to itself, are exact here and rounded once.
template <class Lane> struct LanesOnHost {
  Lane state[32];
  template <class F> void each(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane, state[lane]);
  }
  static float half(uint32_t word, int j) { return gpu::widen(uint16_t(word >> 16 * j)); }
  // m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane 4 g + t: a of rows g, g + 8 and columns 2 t, 2 t + 1 and those
  // + 8; b of rows like a's columns and column g; c of rows g, g + 8 and columns 2 t, 2 t + 1.
  void mma() {
    for (int i = 0; i < Lane::instructions; ++i)
      for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col) {
          float& c = state[4 * (row % 8) + col / 2].acc_of(i)[2 * (row / 8) + col % 2];
          double sum = c;
          for (int k = 0; k < 16; ++k)
            sum += double(half(state[4 * (row % 8) + k % 8 / 2].a_of(i)[2 * (k / 8) + row / 8], k % 2)) *
                   half(state[4 * col + k % 8 / 2].b_of(i)[k / 8], k % 2);
          c = float(sum);
        }
  }
};

void linear_on_host(const gpu::Nf4Linear& a) {
  gpu::with_linear_tile(a.M, [&](auto rt, auto mt) {
    constexpr int RT = decltype(rt)::v, MT = decltype(mt)::v;
    std::vector<float> partials(gpu::kPartials<RT, MT>);
    for (int64_t block = 0; block < gpu::nf4_linear_blocks(a, 16 * RT); ++block)
      for (int64_t m0 = 0; m0 < a.M; m0 += 8 * MT) {
        int product;
        const int64_t row0 = gpu::nf4_linear_place(a, 16 * RT, block, product);
        for (int warp = 0; warp < gpu::kLinearWarps; ++warp) {
          LanesOnHost<gpu::Nf4Lane<RT, MT>> lanes;
          gpu::nf4_linear_warp<RT, MT>(a, a.product[product], row0, m0, warp, lanes, partials.data());
        }
        for (int thread = 0; thread < 32 * gpu::kLinearWarps; ++thread)
          gpu::nf4_linear_finish<RT, MT>(a, a.product[product], row0, m0, thread, partials.data());
      }
  });
}

void linear_dx_on_host(const gpu::Nf4LinearDx& a) {
  gpu::with_dx_tile(a.M, [&](auto mt) {
    constexpr int MT = decltype(mt)::v;
    std::vector<float> partials(gpu::kDxPartials<MT>);
    for (int64_t k0 = 0; k0 < a.K; k0 += gpu::kDxColumns)
      for (int64_t m0 = 0; m0 < a.M; m0 += 8 * MT)
        for (int split = 0; split < a.splits; ++split) {
          for (int warp = 0; warp < gpu::kLinearWarps; ++warp) {
            LanesOnHost<gpu::Nf4DxLane<MT>> lanes;
            gpu::nf4_linear_dx_warp<MT>(a, k0, m0, split, warp, lanes, partials.data());
          }
          for (int thread = 0; thread < 32 * gpu::kLinearWarps; ++thread)
            gpu::nf4_linear_dx_finish<MT>(a, k0, m0, split, thread, partials.data());
        }
  });
}

using Nf4Weight = std::tuple<Rows, Rows, bool, int64_t>;  // codes, absmax, whether it is fp32, block size

void bind_nf4_linear(py::module_& m) {
  define(
      m, "nf4_linear_fwd",
      [](int dtype, bool acc_out, const Rows& x, const std::vector<Nf4Weight>& weights, const std::vector<Product>& products, int64_t M,
         int64_t K, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        std::vector<Nf4Matrix> ws;
        for (const auto& [codes, absmax, wide, blocksize] : weights) {
          int shift = 5;
          while (int64_t(1) << shift < blocksize) ++shift;
          ws.push_back({pointer<const uint8_t>(std::get<0>(codes)), std::get<1>(codes), pointer<const void>(std::get<0>(absmax)),
                        std::get<1>(absmax), wide, shift});
        }
        with_linear_calls(dtype, acc_out, x, products, M, K, threads,
                          [&](const auto& calls) { SWIFTK_DISPATCH(path, linear_fwd(calls.data(), ws.data(), int(calls.size()))); });
      });
  m.def("nf4_linear_as_on_gpu",
        [](const gpu::RowArgs& x, int64_t M, int64_t K, bool wide, const std::vector<gpu::ProductArgs>& products) {
          linear_on_host(gpu::linear_args(x, M, K, wide, products));
        });
  m.def("nf4_linear_dx_as_on_gpu", [](const gpu::RowArgs& dy, int64_t M, int64_t N, int64_t K, const gpu::RowArgs& codes,
                                      const gpu::ScaleArgs& scales, int64_t blocksize, int splits, uintptr_t out) {
    linear_dx_on_host(gpu::linear_dx_args(dy, M, N, K, codes, scales, blocksize, splits, out));
  });
}

}  // namespace swiftk
