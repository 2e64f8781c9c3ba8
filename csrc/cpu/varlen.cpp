#include "cpu/varlen.h"

#include <type_traits>

#define SWIFTK_BODY "cpu/varlen.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {
namespace {

// Packed documents as segments, aligned bottom-right. The values of cu_seqlens are checked here, where they are at hand.
std::vector<Segment> documents(const int32_t* cu_q, const int32_t* cu_k, int64_t batch, int64_t total_q, int64_t total_k) {
  auto check = [&](const std::string& name, const int32_t* cu, const std::string& tensor, int64_t total) {
    auto fail = [&](int64_t i, const std::string& wants) {
      throw std::invalid_argument("varlen_attention: " + name + " has " + std::to_string(cu[i]) + " at index " + std::to_string(i) +
                                  ", wants " + wants);
    };
    if (cu[0] != 0) fail(0, "0: it holds the documents' offsets, the first of which is 0");
    for (int64_t i = 1; i <= batch; ++i)
      if (cu[i] < cu[i - 1]) fail(i, "at least " + std::to_string(cu[i - 1]) + ", the value before it");
    if (cu[batch] > total) fail(batch, "at most " + std::to_string(total) + ", the number of tokens of " + tensor);
  };
  check("cu_seqlens_q", cu_q, "q", total_q);
  check("cu_seqlens_k", cu_k, "k", total_k);
  std::vector<Segment> segments;
  for (int64_t i = 0; i < batch; ++i) {
    const int32_t q_len = cu_q[i + 1] - cu_q[i], k_len = cu_k[i + 1] - cu_k[i];
    if (q_len) segments.push_back({cu_q[i], q_len, cu_k[i], k_len, k_len - q_len, 0});
  }
  return segments;
}

std::vector<Segment> given(const int32_t* rows, int64_t count, int64_t total_q, int64_t total_k) {
  std::vector<Segment> segments(count);
  if (count) std::memcpy(segments.data(), rows, size_t(count) * sizeof(Segment));
  std::vector<std::pair<int32_t, int64_t>> by_start;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    auto fail = [&](const std::string& what) {
      throw std::invalid_argument("segment_attention: segments has (" + std::to_string(s.q_start) + ", " + std::to_string(s.q_len) +
                                  ", " + std::to_string(s.k_start) + ", " + std::to_string(s.k_len) + ", " +
                                  std::to_string(s.q_pos) + ", " + std::to_string(s.k_pos) + ") at row " + std::to_string(i) +
                                  ", wants " + what);
    };
    if (s.q_start < 0 || s.q_len < 0 || int64_t(s.q_start) + s.q_len > total_q)
      fail("queries within the " + std::to_string(total_q) + " tokens of q");
    if (s.k_start < 0 || s.k_len < 0 || int64_t(s.k_start) + s.k_len > total_k)
      fail("keys within the " + std::to_string(total_k) + " tokens of k");
    if (s.k_pos < 0) fail("k_pos >= 0");
    if (s.q_len) by_start.push_back({s.q_start, i});
  }
  std::sort(by_start.begin(), by_start.end());
  for (size_t i = 1; i < by_start.size(); ++i) {
    const Segment &x = segments[by_start[i - 1].second], &y = segments[by_start[i].second];
    if (int64_t(x.q_start) + x.q_len > y.q_start)
      throw std::invalid_argument("segment_attention: segments has queries in common at rows " + std::to_string(by_start[i - 1].second) +
                                  " and " + std::to_string(by_start[i].second) +
                                  ", wants them disjoint within a call; resume with a second call");
  }
  return segments;
}

using Strides = std::tuple<uintptr_t, int64_t, int64_t>;  // address, elements between tokens, between heads

Packed packed(const Strides& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

// heads, kv_heads, dim, scale, softcap, left, right
using Options = std::tuple<int64_t, int64_t, int64_t, double, double, int64_t, int64_t>;

Attention attention(const Strides& q, const Strides& k, const Strides& v, int64_t total_q, const Options& o) {
  return {packed(q), packed(k), packed(v), total_q, std::get<0>(o), std::get<1>(o), std::get<2>(o), std::get<3>(o), std::get<4>(o),
          std::get<5>(o), std::get<6>(o)};
}

void forward(int dtype, const Attention& a, const std::vector<Segment>& segments, uintptr_t out, bool wide, bool resume, uintptr_t lse,
             uintptr_t sinks, int threads, Isa path) {
  dispatch_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    SWIFTK_DISPATCH(path, varlen_fwd<T>(a, segments, pointer<void>(out), wide, resume, pointer<acc_t<T>>(lse), pointer<acc_t<T>>(sinks),
                                        threads));
  });
}

void backward(int dtype, const Attention& a, const Packed& dout, const std::vector<Segment>& segments, uintptr_t out, bool wide,
              uintptr_t lse, uintptr_t dlse, uintptr_t sinks, uintptr_t scratch, uintptr_t dq, uintptr_t dk, uintptr_t dv,
              uintptr_t dsinks, int threads, Isa path) {
  dispatch_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    A* f = pointer<A>(scratch);
    SWIFTK_DISPATCH(path, varlen_bwd<T>(a, dout, segments, pointer<void>(out), wide, pointer<A>(lse), pointer<A>(dlse), pointer<A>(sinks),
                                        f, f + a.heads * a.total_q, pointer<A>(dq), pointer<A>(dk), pointer<A>(dv), pointer<A>(dsinks),
                                        threads));
  });
}

}  // namespace

void bind_varlen(py::module_& m) {
  using Table = std::tuple<uintptr_t, uintptr_t, int64_t>;  // cu_seqlens_q, cu_seqlens_k, batch; or segments, 0, count
  auto table = [](const Table& t, int64_t total_q, int64_t total_k) {
    const auto [first, second, count] = t;
    return second ? documents(pointer<int32_t>(first), pointer<int32_t>(second), count, total_q, total_k)
                  : given(pointer<int32_t>(first), count, total_q, total_k);
  };
  m.def(
      "varlen_fwd",
      [table](int dtype, const Strides& q, const Strides& k, const Strides& v, int64_t total_q, int64_t total_k, const Options& options,
              const Table& t, uintptr_t out, bool wide, bool resume, uintptr_t lse, uintptr_t sinks, int threads,
              const std::string& isa) {
        forward(dtype, attention(q, k, v, total_q, options), table(t, total_q, total_k), out, wide, resume, lse, sinks, threads,
                resolve_isa(isa));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "varlen_bwd",
      [table](int dtype, const Strides& dout, const Strides& q, const Strides& k, const Strides& v, int64_t total_q, int64_t total_k,
              const Options& options, const Table& t, uintptr_t out, bool wide, uintptr_t lse, uintptr_t dlse, uintptr_t sinks,
              uintptr_t scratch, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t dsinks, int threads, const std::string& isa) {
        backward(dtype, attention(q, k, v, total_q, options), packed(dout), table(t, total_q, total_k), out, wide, lse, dlse, sinks,
                 scratch, dq, dk, dv, dsinks, threads, resolve_isa(isa));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
