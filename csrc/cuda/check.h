// After a launch: what CUDA says of it, as an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace swiftk::gpu {

inline void check_launch(const char* op, cudaError_t error = cudaGetLastError()) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA refuses the launch (" + cudaGetErrorString(error) +
                             "); a build for this chip is SWIFTK_CUDA_ARCHS=<its compute capability> python setup.py build_ext --inplace");
}

}  // namespace swiftk::gpu
