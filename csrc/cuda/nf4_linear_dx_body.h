// dx = dy D for few rows of bf16 dy, as what one warp does; see nf4_linear_body.h.
//
// A block of threads takes 128 columns of the weight and 8 MT rows of dy; the rows of the weight are shared out in sixteens to its
// eight warps and to `splits` such blocks, whose sums are left apart: out (splits, M, K). D^T is the left operand: a lane decodes
// 16 neighbours along K of four rows, 4 t to 4 t + 3 of the sixteen, and pairs them row by row. One accumulator adds a warp's rows
// in their order, the warps are added as in nf4_linear. Reasoned, not measured: no GPU has run this.
#pragma once

#include "cuda/nf4_linear_body.h"

namespace swiftk::gpu {

constexpr int kDxColumns = 128, kDxRows = 16;

struct Nf4LinearDx {
  const uint16_t* dy;  // every row begins at 8 bytes and goes on with zeros to a multiple of 4 elements
  int64_t ld_dy, M, N, K;
  const uint8_t* codes;
  int64_t ld_codes;
  Nf4Scales scales;
  int scale_kind, shift;
  bool vectors;  // every row of codes begins at 8 bytes
  int splits;
  float* out;
};

template <int MT> struct Nf4DxLane {
  uint32_t codes[4][2];
  float absmax[4];
  uint32_t a[8][4], b[MT][2];
  float acc[8][MT][4];
  static constexpr int instructions = 8 * MT;
  SWIFTK_HD const uint32_t* a_of(int i) const { return a[i / MT]; }
  SWIFTK_HD const uint32_t* b_of(int i) const { return b[i % MT]; }
  SWIFTK_HD float* acc_of(int i) { return acc[i / MT][i % MT]; }
};

template <int MT> SWIFTK_HD void load_dx_operands(const Nf4LinearDx& a, int64_t k0, int64_t m0, int64_t n0, int lane, Nf4DxLane<MT>& s) {
  const int64_t k = k0 + 16 * (lane / 4), n = n0 + 4 * (lane % 4);
  int64_t rows[4];  // beyond the weight the last one again: its dy is 0
  SWIFTK_UNROLL
  for (int r = 0; r < 4; ++r) rows[r] = n + r < a.N ? n + r : a.N - 1;
  if (a.vectors && k + 16 <= a.K) {
    SWIFTK_UNROLL
    for (int r = 0; r < 4; ++r) load8(a.codes + rows[r] * a.ld_codes + k / 2, s.codes[r]);
  } else {
    SWIFTK_UNROLL
    for (int r = 0; r < 4; ++r)
      SWIFTK_UNROLL
      for (int w = 0; w < 2; ++w) s.codes[r][w] = nf4_codes8(a.codes + rows[r] * a.ld_codes, k + 8 * w, a.K);
  }
  SWIFTK_UNROLL
  for (int r = 0; r < 4; ++r) s.absmax[r] = k < a.K ? nf4_scale(a.scale_kind, a.scales, rows[r], k >> a.shift) : 0;
  SWIFTK_UNROLL
  for (int m = 0; m < MT; ++m) {
    const int64_t row = m0 + 8 * m + lane / 4;
    s.b[m][0] = s.b[m][1] = 0;
    if (n < a.N) load8(a.dy + (row < a.M ? row : a.M - 1) * a.ld_dy + n, s.b[m]);
  }
}

// Instruction i takes columns 2 i and 2 i + 1 of every lane's 16, as rows g and g + 8 of the left operand.
template <int MT> SWIFTK_HD void decode_dx_operands(Nf4DxLane<MT>& s) {
  Nf4Planes planes[4];
  SWIFTK_UNROLL
  for (int r = 0; r < 4; ++r) planes[r] = nf4_planes(s.absmax[r]);
  SWIFTK_UNROLL
  for (int w = 0; w < 2; ++w) {
    uint32_t pairs[4][4];
    SWIFTK_UNROLL
    for (int r = 0; r < 4; ++r) nf4_decode8(s.codes[r][w], planes[r], pairs[r]);
    SWIFTK_UNROLL
    for (int j = 0; j < 4; ++j) {
      uint32_t* to = s.a[4 * w + j];
      to[0] = byte_permute(pairs[0][j], pairs[1][j], 0x5410), to[1] = byte_permute(pairs[0][j], pairs[1][j], 0x7632);
      to[2] = byte_permute(pairs[2][j], pairs[3][j], 0x5410), to[3] = byte_permute(pairs[2][j], pairs[3][j], 0x7632);
    }
  }
}

template <int MT> constexpr int kDxPartials = kLinearWarps * 8 * MT * kDxColumns;
template <int MT> SWIFTK_HD int dx_partial_at(int warp, int m, int k) { return (warp * 8 * MT + m) * kDxColumns + k; }

template <int MT, class Lanes>
SWIFTK_HD void nf4_linear_dx_warp(const Nf4LinearDx& a, int64_t k0, int64_t m0, int split, int warp, Lanes& lanes, float* partials) {
  using Lane = Nf4DxLane<MT>;
  lanes.each([&](int, Lane& s) {
    SWIFTK_UNROLL
    for (int i = 0; i < 8 * MT * 4; ++i) s.acc[i / (MT * 4)][i / 4 % MT][i % 4] = 0;
  });
  for (int64_t n0 = (split * kLinearWarps + warp) * kDxRows; n0 < a.N; n0 += int64_t(a.splits) * kLinearWarps * kDxRows) {
    lanes.each([&](int lane, Lane& s) {
      load_dx_operands(a, k0, m0, n0, lane, s);
      decode_dx_operands(s);
    });
    lanes.mma();
  }
  lanes.each([&](int lane, Lane& s) {
    SWIFTK_UNROLL
    for (int i = 0; i < 8; ++i)
      SWIFTK_UNROLL
      for (int m = 0; m < MT; ++m)
        SWIFTK_UNROLL
        for (int j = 0; j < 4; ++j)
          partials[dx_partial_at<MT>(warp, 8 * m + 2 * (lane % 4) + j % 2, 16 * (lane / 4) + 2 * i + j / 2)] = s.acc[i][m][j];
  });
}

template <int MT>
SWIFTK_HD void nf4_linear_dx_finish(const Nf4LinearDx& a, int64_t k0, int64_t m0, int split, int thread, const float* partials) {
  for (int i = thread; i < kDxColumns * 8 * MT; i += 32 * kLinearWarps) {
    const int64_t k = k0 + i % kDxColumns, m = m0 + i / kDxColumns;
    if (k < a.K && m < a.M) a.out[(split * a.M + m) * a.K + k] = sum_of_warps(partials + i, 8 * MT * kDxColumns);
  }
}

template <class F> void with_dx_tile(int64_t M, F&& f) {
  if (M <= 8) f(Constant<1>{});
  else f(Constant<2>{});
}

}  // namespace swiftk::gpu
