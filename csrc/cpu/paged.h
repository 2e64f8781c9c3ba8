// The paged cache as the native calls see it.
#pragma once

#include <cstdint>

namespace swiftk {

// (blocks, block_size, kv_heads, head_dim), the last dimension contiguous; strides in elements.
struct Paged {
  uintptr_t data;
  int64_t block, token, head;
};

// Position p of sequence i lies in block table[i * ld + p / block_size], at token p % block_size.
struct BlockTable {
  const int32_t* table;
  int64_t ld, block_size;
};

}  // namespace swiftk
