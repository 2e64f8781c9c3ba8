// What csrc/bindings_cuda.cpp binds: launches on a stream (a cudaStream_t), which throw std::runtime_error where CUDA refuses one.
#pragma once

#include "cuda/nf4_linear_dx_body.h"

namespace swiftk::gpu {

using Stream = void*;

void launch_nf4_dequantize(const Nf4Dequantize&, int scale_kind, bool wide, Stream);  // wide: fp32 out
// first_bad: the least block that is not finite, as atomicMin finds it
void launch_nf4_quantize(const Nf4Quantize&, int dtype, unsigned long long* first_bad, Stream);
void launch_nf4_linear(const Nf4Linear&, Stream);
void launch_nf4_linear_dx(const Nf4LinearDx&, Stream);

}  // namespace swiftk::gpu
