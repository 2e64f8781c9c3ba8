// nf4_linear for few rows on a GPU: a grid of nf4_linear_body.h.
#include "cuda/check.h"
#include "cuda/launch.h"

namespace swiftk::gpu {

// One lane; its 31 neighbours run the same instructions beside it.
template <int RT, int MT> struct LanesOnGpu {
  Nf4Lane<RT, MT> state;
  template <class F> __device__ __forceinline__ void each(F f) { f(int(threadIdx.x % 32), state); }
  __device__ __forceinline__ void mma() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < RT; ++r)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint32_t *a = state.a[i][r], *b = state.b[i][m];
          float* c = state.acc[r][m];
          asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                       : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                       : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
  }
};

template <int RT, int MT>
__global__ void __launch_bounds__(32 * kLinearWarps) nf4_linear(const __grid_constant__ Nf4Linear a) {
  extern __shared__ float partials[];
  int product;
  const int64_t row0 = nf4_linear_place(a, 16 * RT, blockIdx.x, product), m0 = int64_t(blockIdx.y) * 8 * MT;
  const Nf4Product& p = a.product[product];
  LanesOnGpu<RT, MT> lanes;
  nf4_linear_warp<RT, MT>(a, p, row0, m0, int(threadIdx.x / 32), lanes, partials);
  __syncthreads();
  nf4_linear_finish<RT, MT>(a, p, row0, m0, int(threadIdx.x), partials);
}

void launch_nf4_linear(const Nf4Linear& a, Stream stream) {
  with_linear_tile(a.M, [&](auto rt, auto mt) {
    constexpr int RT = decltype(rt)::v, MT = decltype(mt)::v, bytes = 4 * kPartials<RT, MT>;
    static_assert(bytes <= 163 << 10, "shared memory of sm_80");
    const int64_t blocks = nf4_linear_blocks(a, 16 * RT), rows = (a.M + 8 * MT - 1) / (8 * MT);
    if (blocks == 0 || rows == 0) return;
    if (bytes > 48 << 10)
      check_launch("nf4_linear", cudaFuncSetAttribute(nf4_linear<RT, MT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    nf4_linear<RT, MT><<<dim3(unsigned(blocks), unsigned(rows)), 32 * kLinearWarps, bytes, cudaStream_t(stream)>>>(a);
    check_launch("nf4_linear");
  });
}

}  // namespace swiftk::gpu
