// nf4_dequantize and nf4_quantize on a GPU: grids of the bodies in nf4_body.h. A block's bytes depend on that block alone and are
// those of the CPU's kernels.
#include "cuda/check.h"
#include "cuda/launch.h"

namespace swiftk::gpu {

template <int kind, class O> __global__ void __launch_bounds__(kDequantizeThreads) nf4_dequantize(const Nf4Dequantize a) {
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = nf4_value(int(threadIdx.x));
  __syncthreads();
  nf4_dequantize_thread<kind, O>(a, blockIdx.x, int(threadIdx.x), values);
}

void launch_nf4_dequantize(const Nf4Dequantize& a, int scale_kind, bool wide, Stream stream) {
  if (a.blocks() == 0) return;
  check_earlier("nf4_dequantize");
  const auto run = [&](auto kernel) { kernel<<<unsigned(a.blocks()), kDequantizeThreads, 0, cudaStream_t(stream)>>>(a); };
  switch (scale_kind) {
    case kScaleBf16: wide ? run(nf4_dequantize<kScaleBf16, float>) : run(nf4_dequantize<kScaleBf16, uint16_t>); break;
    case kScaleFp32: wide ? run(nf4_dequantize<kScaleFp32, float>) : run(nf4_dequantize<kScaleFp32, uint16_t>); break;
    default: wide ? run(nf4_dequantize<kScaleNested, float>) : run(nf4_dequantize<kScaleNested, uint16_t>); break;
  }
  check_launch("nf4_dequantize");
}

constexpr int kWarps = 8;

template <class T> __global__ void __launch_bounds__(32 * kWarps) nf4_quantize(const Nf4Quantize a, unsigned long long* first_bad) {
  const int64_t block = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = int(threadIdx.x % 32);
  if (block >= a.blocks()) return;  // whole warps
  const uint32_t largest = __reduce_max_sync(0xffffffff, nf4_largest_of_lane<T>(a, block, lane));
  nf4_codes_of_lane<T>(a, block, lane, largest);
  if (lane == 0 && largest >= kInfinity) atomicMin(first_bad, static_cast<unsigned long long>(block));
}

void launch_nf4_quantize(const Nf4Quantize& a, int dtype, unsigned long long* first_bad, Stream stream) {
  if (a.blocks() == 0) return;
  check_earlier("nf4_quantize");
  const unsigned grid = unsigned((a.blocks() + kWarps - 1) / kWarps);
  const auto run = [&](auto kernel) { kernel<<<grid, 32 * kWarps, 0, cudaStream_t(stream)>>>(a, first_bad); };
  switch (dtype) {
    case 0: run(nf4_quantize<uint16_t>); break;
    case 1: run(nf4_quantize<float>); break;
    default: run(nf4_quantize<double>); break;
  }
  check_launch("nf4_quantize");
}

}  // namespace swiftk::gpu
