// The log-sum-exp of a row of logits that arrive a block of columns at a time. No include guard: a body, like vec.h, for the
// .inc files that need it.
//
// A row walks its columns in steps of kStep from column 0 and keeps, of the logits s seen so far,
//   m = max s,  l = sum exp(s - m),  e = sum exp(s - m) (s - m),  argmax,  the logit of its label,  sum s:
// the steps depend on the column alone, never on the rows beside it or on how many columns a call brings (every call but
// the last brings a multiple of kStep), so the bits of a row are the same for any number of rows and threads.
// With softcap c > 0 the logits z are first replaced by s = c tanh(z / c), in place.
constexpr int64_t kStep = 2048;  // 8 KB of fp32: the passes over one step of one row hit the first-level cache

// One row's running statistics; `e` and `sum` only where asked for.
template <class A> struct RowStats {
  A m, l, e, sum, label;
  int64_t argmax;
};

// Brings columns [0, cols) of one row, which are the ids first_id ..., into its statistics.
template <class A> void row_stats(A* s, int64_t cols, int64_t first_id, int64_t label, A softcap, bool entropy, bool total, RowStats<A>& row) {
  using V = Vec<A>;
  constexpr int W = V::width;
  for (int64_t start = 0; start < cols; start += kStep) {
    A* x = s + start;
    const int64_t n = std::min(kStep, cols - start), body = n / W * W;
    const int tail = int(n - body);
    if (softcap > 0) {
      const V cap = V::set1(softcap), inverse = V::set1(A(1) / softcap);
      for (int64_t j = 0; j < body; j += W) (cap * tanh(V::load(x + j) * inverse)).store(x + j);
      if (tail) (cap * tanh(V::load_n(x + body, tail) * inverse)).store_n(x + body, tail);
    }
    V top = V::set1(row.m);
    for (int64_t j = 0; j < body; j += W) top = max(V::load(x + j), top);  // a NaN never becomes the maximum
    A m = hmax(top);
    for (int64_t j = body; j < n; ++j) m = x[j] > m ? x[j] : m;
    if (m > row.m) {
      int64_t j = 0;
      while (x[j] != m) ++j;
      row.argmax = first_id + start + j;
    }
    // (-inf) - (-inf) is NaN: a row of nothing but -inf so far refers to 0 instead
    const A reference = m == -std::numeric_limits<A>::infinity() ? A(0) : m;
    const V shift = V::set1(reference);
    alignas(64) A rest[W];  // the tail, filled up with logits whose exponential is 0
    for (int j = 0; j < W; ++j) rest[j] = j < tail ? x[body + j] : reference - A(1000);
    V l = V::zero(), e = V::zero();
    if (entropy) {
      auto step = [&](V d) {
        const V p = exp(d);
        l = l + p;
        e = fma(p, d, e);
      };
      for (int64_t j = 0; j < body; j += W) step(V::load(x + j) - shift);
      if (tail) step(V::load(rest) - shift);
    } else {
      for (int64_t j = 0; j < body; j += W) l = l + exp(V::load(x + j) - shift);
      if (tail) l = l + exp(V::load(rest) - shift);
    }
    if (row.l > 0) {  // exp(s - m_old) = exp(s - m) exp(m_old - m): not where nothing was seen before
      const A d = row.m - reference, scale = std::exp(d);
      row.e = (row.e + row.l * d) * scale;
      row.l *= scale;
    }
    row.l += sum(l);
    row.e += sum(e);
    row.m = m;
    if (total) {
      V t = V::zero();
      for (int64_t j = 0; j < body; j += W) t = t + V::load(x + j);
      if (tail) t = t + V::load_n(x + body, tail);
      row.sum += sum(t);
    }
  }
  const int64_t at = label - first_id;
  if (at >= 0 && at < cols) row.label = s[at];
}

// log p of a token with logit s, from m and log l of its row. The small differences come first: for a token with p near 1,
// s - lse would lose what the rounding of lse takes, 1e-6 at lse = 20 in fp32.
template <class A> inline A log_prob(A s, A m, A log_l) { return (s - m) - log_l; }
