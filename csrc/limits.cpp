// What the machine can do, for the benchmarks' percentages.
#include <omp.h>

#include <cstdint>

#include "bindings.h"

namespace swiftk {

namespace {

// Reads every byte once, in one ascending stream per thread; the result keeps the compiler from leaving it out.
// (torch's own reductions and matrix-vector products read at 0.5 to 0.75 times this rate: Zen 3, 2 threads.)
uint64_t read_memory(const uint64_t* data, int64_t words, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : total)
  for (int t = 0; t < threads; ++t) {
    const int64_t end = words / 16 * (t + 1) / threads * 16;
    uint64_t part[16] = {};
    for (int64_t i = words / 16 * t / threads * 16; i < end; i += 16)
      for (int j = 0; j < 16; ++j) part[j] ^= data[i + j];
    for (uint64_t p : part) total ^= p;
  }
  return total;
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def(
      "read_memory",
      [](uintptr_t data, int64_t bytes, int threads) { return read_memory(reinterpret_cast<const uint64_t*>(data), bytes / 8, threads); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
