// Around a launch: what CUDA says of it, as an exception, and not of what went wrong before it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace swiftk::gpu {

inline void check(const char* op, const char* what, cudaError_t error, const char* next) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + what + " (" + cudaGetErrorString(error) + ")" + next);
}

// Before the first call of a launcher: somebody's error that nobody has looked at would be taken for the launch's.
inline void check_earlier(const char* op) {
  check(op, "an earlier CUDA error, of another call", cudaGetLastError(), "; CUDA_LAUNCH_BLOCKING=1 shows whose");
}

inline void check_launch(const char* op, cudaError_t error = cudaGetLastError()) {
  const bool missing = error == cudaErrorNoKernelImageForDevice;
  check(op, "CUDA refuses the launch", error,
        missing ? "; SWIFTK_CUDA_ARCHS=<its compute capability> python setup.py build_ext --inplace builds for this chip" : "");
}

}  // namespace swiftk::gpu
