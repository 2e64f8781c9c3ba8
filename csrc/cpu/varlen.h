// What one call of the attention kernels is given: the tensors, the options, and the rows and keys that meet.
#pragma once

#include <cstdint>

namespace swiftk {

// Queries [q_start, q_start + q_len) meet keys [k_start, k_start + k_len). Query i of the segment has position q_pos + i,
// key j position k_pos + j >= 0: causal, windows and the KV tiles are in positions.
struct Segment {
  int32_t q_start, q_len, k_start, k_len, q_pos, k_pos;
};

// A (tokens, heads, head_dim) tensor whose last dimension is contiguous; strides in elements.
struct Packed {
  uintptr_t data;
  int64_t token, head;
  template <class T> const T* row(int64_t t, int64_t h) const { return reinterpret_cast<const T*>(data) + t * token + h * head; }
};

struct Attention {
  Packed q, k, v;
  int64_t total_q, heads, kv_heads, dim;
  double scale, softcap;  // softcap 0: none
  int64_t left, right;    // window in positions, -1: unlimited; causal is right = 0
  int64_t group() const { return heads / kv_heads; }
  // Keys that a query at position p sees: positions [first_key(p), last_key(p)).
  int64_t first_key(int64_t p) const { return left < 0 ? INT64_MIN : p - left; }
  int64_t last_key(int64_t p) const { return right < 0 ? INT64_MAX : p + right + 1; }
};

}  // namespace swiftk
