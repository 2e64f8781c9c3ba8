#include "cpu/paged.h"
#include "cpu/varlen.h"

#define SWIFTK_BODY "cpu/paged.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {
namespace {

using Strides = std::tuple<uintptr_t, int64_t, int64_t>;                 // address, elements between tokens, between heads
using CacheStrides = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;   // address, elements between blocks, tokens, heads
using Cache = std::tuple<CacheStrides, CacheStrides, int64_t, int64_t>;  // k_cache, v_cache, blocks, block_size
using Table = std::tuple<uintptr_t, int64_t, int64_t>;                   // block_table, elements between rows, max_blocks
using Options = std::tuple<int64_t, int64_t, int64_t, double, double, int64_t, int64_t>;  // as in varlen.cpp

Paged paged(const CacheStrides& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

[[noreturn]] void fail(const std::string& name, int64_t value, const std::string& at, const std::string& wants) {
  throw std::invalid_argument("paged_attention: " + name + " has " + std::to_string(value) + " at " + at + ", wants " + wants);
}

// One segment per sequence that has queries. Lengths and block ids are read and checked here, call by call.
std::vector<Segment> sequences(const int32_t* cu_q, const int32_t* seqlens, const Table& t, const Cache& cache, int64_t batch,
                               int64_t total_q) {
  const auto [address, ld, max_blocks] = t;
  const int64_t blocks = std::get<2>(cache), block_size = std::get<3>(cache);
  if (cu_q[0] != 0) fail("cu_seqlens_q", cu_q[0], "index 0", "0: it holds the sequences' offsets, the first of which is 0");
  std::vector<Segment> segments;
  segments.reserve(size_t(batch));
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t q_len = int64_t(cu_q[i + 1]) - cu_q[i], seqlen = seqlens[i];
    auto index = [](int64_t at) { return "index " + std::to_string(at); };
    if (q_len < 0)
      fail("cu_seqlens_q", cu_q[i + 1], index(i + 1), "at least " + std::to_string(cu_q[i]) + ", the value before it");
    if (seqlen < 0 || seqlen > max_blocks * block_size)
      fail("cache_seqlens", seqlen, index(i),
           "0 .. " + std::to_string(max_blocks * block_size) + ": block_table has " + std::to_string(max_blocks) + " blocks of " +
               std::to_string(block_size) + " tokens a sequence");
    if (seqlen && seqlen < q_len)
      fail("cache_seqlens", seqlen, index(i),
           "0 (padding) or at least " + std::to_string(q_len) + ", the sequence's queries: their keys are in the cache too");
    const int32_t* row = pointer<int32_t>(address) + i * ld;
    for (int64_t b = 0; b * block_size < seqlen; ++b)
      if (row[b] < 0 || row[b] >= blocks)
        fail("block_table", row[b], "[" + std::to_string(i) + ", " + std::to_string(b) + "]",
             "0 .. " + std::to_string(blocks - 1) + ", a block of k_cache");
    if (q_len) segments.push_back({cu_q[i], int32_t(q_len), int32_t(i), int32_t(seqlen), int32_t(seqlen - q_len), 0});
  }
  if (cu_q[batch] > total_q)
    fail("cu_seqlens_q", cu_q[batch], "index " + std::to_string(batch),
         "at most " + std::to_string(total_q) + ", the number of tokens of q");
  return segments;
}

void attend(int dtype, const Strides& q, int64_t total_q, const Cache& cache, const Options& o, uintptr_t cu_q, uintptr_t seqlens,
            const Table& table, int64_t batch, uintptr_t out, int64_t ld_out, uintptr_t lse, uintptr_t sinks, int threads,
            const std::string& isa) {
  const Isa path = resolve_isa(isa);
  const Attention a{{std::get<0>(q), std::get<1>(q), std::get<2>(q)}, {}, {}, total_q, std::get<0>(o), std::get<1>(o), std::get<2>(o),
                    std::get<3>(o), std::get<4>(o), std::get<5>(o), std::get<6>(o)};
  const std::vector<Segment> segments = sequences(pointer<int32_t>(cu_q), pointer<int32_t>(seqlens), table, cache, batch, total_q);
  const Paged k = paged(std::get<0>(cache)), v = paged(std::get<1>(cache));
  const BlockTable blocks{pointer<int32_t>(std::get<0>(table)), std::get<1>(table), std::get<3>(cache)};
  dispatch_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    SWIFTK_DISPATCH(path, paged_fwd<T>(a, segments, {k, v, blocks}, pointer<T>(out), ld_out, pointer<acc_t<T>>(lse),
                                       pointer<acc_t<T>>(sinks), threads));
  });
}

// Rows of `heads` times `dim` elements of `bytes` bytes, token t to its slot.
void store(const Strides& from, const CacheStrides& to, int64_t block_size, const int64_t* slots, int64_t tokens, int64_t heads,
           int64_t dim, int64_t bytes, int threads) {
  const auto [source, from_token, from_head] = from;
  const auto [target, to_block, to_token, to_head] = to;
  const bool whole = from_head == dim && to_head == dim;
  const size_t piece = size_t((whole ? heads : 1) * dim * bytes);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0) continue;
    const char* x = pointer<char>(source) + t * from_token * bytes;
    char* y = pointer<char>(target) + (slots[t] / block_size * to_block + slots[t] % block_size * to_token) * bytes;
    for (int64_t h = 0; h < (whole ? 1 : heads); ++h) std::memcpy(y + h * to_head * bytes, x + h * from_head * bytes, piece);
  }
}

void store_kv(int dtype, const Strides& k, const Strides& v, const Cache& cache, uintptr_t slot_mapping, int64_t tokens, int64_t heads,
              int64_t dim, int threads) {
  const auto& [k_cache, v_cache, blocks, block_size] = cache;
  const int64_t* slots = pointer<int64_t>(slot_mapping);
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < -1 || slots[t] >= blocks * block_size)
      throw std::invalid_argument("store_kv_: slot_mapping has " + std::to_string(slots[t]) + " at token " + std::to_string(t) +
                                  ", wants -1 (skip) or 0 .. " + std::to_string(blocks * block_size - 1) + ", block * " +
                                  std::to_string(block_size) + " + offset");
  dispatch_dtype(dtype, [&, &k_cache = k_cache, &v_cache = v_cache, block_size = block_size](auto t) {
    store(k, k_cache, block_size, slots, tokens, heads, dim, sizeof(t), threads);
    store(v, v_cache, block_size, slots, tokens, heads, dim, sizeof(t), threads);
  });
}

}  // namespace

void bind_paged(py::module_& m) {
  define(m, "paged_fwd", attend);
  define(m, "store_kv", store_kv);
}

}  // namespace swiftk
