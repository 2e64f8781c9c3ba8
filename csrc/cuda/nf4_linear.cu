// nf4_linear and its dx for few rows on a GPU: grids of nf4_linear_body.h and nf4_linear_dx_body.h.
#include "cuda/check.h"
#include "cuda/launch.h"

namespace swiftk::gpu {

// One lane; its 31 neighbours run the same instructions beside it.
template <class Lane> struct LanesOnGpu {
  Lane state;
  template <class F> __device__ __forceinline__ void each(F f) { f(int(threadIdx.x % 32), state); }
  __device__ __forceinline__ void mma() {
#pragma unroll
    for (int i = 0; i < Lane::instructions; ++i) {
      const uint32_t *a = state.a_of(i), *b = state.b_of(i);
      float* c = state.acc_of(i);
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
};

// Blocks of threads beside each other: for one row tile the 24 warps that hide what they load; with two a second block would spill.
template <int MT> constexpr int kBeside = MT == 1 ? 3 : 1;

template <int RT, int MT>
__global__ void __launch_bounds__(32 * kLinearWarps, kBeside<MT>) nf4_linear(const __grid_constant__ Nf4Linear a) {
  extern __shared__ float partials[];
  int product;
  const int64_t row0 = nf4_linear_place(a, 16 * RT, blockIdx.x, product), m0 = int64_t(blockIdx.y) * 8 * MT;
  const Nf4Product& p = a.product[product];
  LanesOnGpu<Nf4Lane<RT, MT>> lanes;
  nf4_linear_warp<RT, MT>(a, p, row0, m0, int(threadIdx.x / 32), lanes, partials);
  __syncthreads();
  nf4_linear_finish<RT, MT>(a, p, row0, m0, int(threadIdx.x), partials);
}

template <class Kernel> void allow_shared(const char* op, Kernel kernel, int bytes) {
  if (bytes > 48 << 10) check_launch(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

void launch_nf4_linear(const Nf4Linear& a, Stream stream) {
  with_linear_tile(a.M, [&](auto rt, auto mt) {
    constexpr int RT = decltype(rt)::v, MT = decltype(mt)::v, bytes = 4 * kPartials<RT, MT>;
    static_assert(bytes <= 163 << 10, "shared memory of sm_80");
    const int64_t blocks = nf4_linear_blocks(a, 16 * RT), rows = (a.M + 8 * MT - 1) / (8 * MT);
    if (blocks == 0 || rows == 0) return;
    check_earlier("nf4_linear");
    allow_shared("nf4_linear", nf4_linear<RT, MT>, bytes);
    nf4_linear<RT, MT><<<dim3(unsigned(blocks), unsigned(rows)), 32 * kLinearWarps, bytes, cudaStream_t(stream)>>>(a);
    check_launch("nf4_linear");
  });
}

template <int MT> __global__ void __launch_bounds__(32 * kLinearWarps) nf4_linear_dx(const __grid_constant__ Nf4LinearDx a) {
  extern __shared__ float partials[];
  const int64_t k0 = int64_t(blockIdx.x) * kDxColumns, m0 = int64_t(blockIdx.y) * 8 * MT;
  LanesOnGpu<Nf4DxLane<MT>> lanes;
  nf4_linear_dx_warp<MT>(a, k0, m0, int(blockIdx.z), int(threadIdx.x / 32), lanes, partials);
  __syncthreads();
  nf4_linear_dx_finish<MT>(a, k0, m0, int(blockIdx.z), int(threadIdx.x), partials);
}

void launch_nf4_linear_dx(const Nf4LinearDx& a, Stream stream) {
  with_dx_tile(a.M, [&](auto mt) {
    constexpr int MT = decltype(mt)::v, bytes = 4 * kDxPartials<MT>;
    static_assert(bytes <= 163 << 10, "shared memory of sm_80");
    const int64_t columns = (a.K + kDxColumns - 1) / kDxColumns, rows = (a.M + 8 * MT - 1) / (8 * MT);
    if (columns == 0 || rows == 0) return;
    check_earlier("nf4_linear_dx");
    allow_shared("nf4_linear_dx", nf4_linear_dx<MT>, bytes);
    nf4_linear_dx<MT><<<dim3(unsigned(columns), unsigned(rows), unsigned(a.splits)), 32 * kLinearWarps, bytes, cudaStream_t(stream)>>>(a);
    check_launch("nf4_linear_dx");
  });
}

}  // namespace swiftk::gpu
