// y = scale (x D^T + s t^T) + bias for few rows of bf16 x, as what one warp does: csrc/cuda/nf4_linear.cu runs it in a grid,
// csrc/cpu/nf4_linear.cpp lane after lane for the tests (whose `mma` is the layout of the instruction, written out).
//
// A block of threads takes 16 RT rows of the weight and 8 MT rows of x; its eight warps share out K in chunks of 256: warp w takes
// the chunks w, w + 8, ... Every lane decodes 64 neighbours along K of two weight rows (a block's table is made once for them) into
// the registers that mma.m16n8k16 wants of its left operand; codes never go through shared memory, and every weight of a chunk is
// decoded once for all rows of x. K runs through the instruction in an order of its own, the same for x.
// The order of a sum: a warp's chunks one after another, 16 elements an instruction, in one fp32 accumulator; then
// ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)); then the tail by fused multiply-adds. RT and MT are not in it.
// Sizes are reasoned from registers and bytes in flight, not measured: no GPU has run this.
#pragma once

#include "cuda/nf4_body.h"

namespace swiftk::gpu {

constexpr int kLinearWarps = 8, kChunk = 256, kMaxProducts = 4;

struct Nf4Product {
  const uint8_t* codes;
  int64_t ld_codes;
  Nf4Scales scales;
  int scale_kind, shift;
  bool vectors;  // every row of codes begins at 16 bytes
  const uint16_t *s, *t;
  int64_t ld_s, ld_t;
  int rank;  // 0: no tail
  const float* scale;
  const uint16_t* bias;
  void* y;
  int64_t ld_y, N;
};

struct Nf4Linear {
  const uint16_t* x;  // every row begins at 16 bytes and goes on with zeros to a multiple of 8 elements
  int64_t ldx, M;
  int K;  // 32 bits: what is counted along K takes a register, not two
  bool wide;  // fp32 y
  int products;
  Nf4Product product[kMaxProducts];
};

template <int RT, int MT> struct Nf4Lane {
  uint32_t codes[RT][2][8];  // rows g and g + 8 of each 16, 64 elements of each
  float absmax[RT][2];       // of the block in which they begin
  Nf4Planes planes[RT][2];
  uint32_t a[2][RT][4], b[2][MT][2];  // the operands of two instructions a tile
  float acc[RT][MT][4];
  static constexpr int instructions = 2 * RT * MT;  // of one mma(): which operands, and where the i-th adds
  SWIFTK_HD const uint32_t* a_of(int i) const { return a[i / (RT * MT)][i / MT % RT]; }
  SWIFTK_HD const uint32_t* b_of(int i) const { return b[i / (RT * MT)][i % MT]; }
  SWIFTK_HD float* acc_of(int i) { return acc[i / MT % RT][i % MT]; }
};

SWIFTK_HD float nf4_scale(int kind, const Nf4Scales& scales, int64_t row, int64_t block) {
  if (kind == kScaleBf16) return nf4_scale<kScaleBf16>(scales, row, block);
  return kind == kScaleFp32 ? nf4_scale<kScaleFp32>(scales, row, block) : nf4_scale<kScaleNested>(scales, row, block);
}

// Eight elements of x, zeros beyond its columns. What is beyond its rows meets accumulators that are not stored: the last row.
SWIFTK_HD Vector16 load_x(const Nf4Linear& a, int64_t m, int k) {
  if (k >= a.K) return {{0, 0, 0, 0}};
  return load16(a.x + (m < a.M ? m : a.M - 1) * a.ldx + k);
}

// The i-th weight row of a lane; beyond the weight the last one again.
SWIFTK_HD int64_t row_of(const Nf4Product& p, int64_t row0, int i, int lane) {
  const int64_t row = row0 + 8 * i + lane / 4;
  return row < p.N ? row : p.N - 1;
}

// A lane's codes and absmax of the chunk that begins at k0; lane = 4 g + t.
template <int RT, int MT> SWIFTK_HD void load_codes(const Nf4Linear& a, const Nf4Product& p, int64_t row0, int k0, int lane, Nf4Lane<RT, MT>& s) {
  const int k = k0 + 64 * (lane % 4);
  int64_t rows[2 * RT];
  SWIFTK_UNROLL
  for (int i = 0; i < 2 * RT; ++i) rows[i] = row_of(p, row0, i, lane);
  if (p.vectors && k + 64 <= a.K) {
    SWIFTK_UNROLL
    for (int i = 0; i < 2 * RT; ++i) {
      const uint8_t* from = p.codes + rows[i] * p.ld_codes + k / 2;
      const Vector16 low = load16(from), high = load16(from + 16);
      SWIFTK_UNROLL
      for (int w = 0; w < 4; ++w) s.codes[i / 2][i % 2][w] = low.word[w], s.codes[i / 2][i % 2][4 + w] = high.word[w];
    }
  } else {
    SWIFTK_UNROLL
    for (int i = 0; i < 2 * RT; ++i)
      SWIFTK_UNROLL
      for (int w = 0; w < 8; ++w) s.codes[i / 2][i % 2][w] = nf4_codes8(p.codes + rows[i] * p.ld_codes, k + 8 * w, a.K);
  }
  SWIFTK_UNROLL
  for (int i = 0; i < 2 * RT; ++i) s.absmax[i / 2][i % 2] = k < a.K ? nf4_scale(p.scale_kind, p.scales, rows[i], k >> p.shift) : 0;
}

// The operands of two instructions from the w-th of the next words of the codes: four elements of each row to each.
template <int RT, int MT> SWIFTK_HD void make_operands(const Nf4Linear& a, int64_t m0, int k0, int first, int w, int lane, Nf4Lane<RT, MT>& s) {
  SWIFTK_UNROLL
  for (int i = 0; i < 2 * RT; ++i) {
    uint32_t pairs[4];
    nf4_decode8(s.codes[i / 2][i % 2][w], s.planes[i / 2][i % 2], pairs);
    SWIFTK_UNROLL
    for (int j = 0; j < 4; ++j) s.a[j / 2][i / 2][2 * (j % 2) + i % 2] = pairs[j];
  }
  SWIFTK_UNROLL
  for (int i = 0; i < MT; ++i) {
    const Vector16 x = load_x(a, m0 + 8 * i + lane / 4, k0 + 64 * (lane % 4) + 8 * (first + w));
    SWIFTK_UNROLL
    for (int j = 0; j < 4; ++j) s.b[j / 2][i][j % 2] = x.word[j];
  }
}

// Before word `first`: the tables of the block that begins there; a second one only where blocks are of 32.
template <int RT, int MT>
SWIFTK_HD void make_planes(const Nf4Linear& a, const Nf4Product& p, int64_t row0, int k0, int first, int lane, Nf4Lane<RT, MT>& s) {
  if (first == 4 && p.shift == 5) {
    const int k = k0 + 64 * (lane % 4) + 32;
    SWIFTK_UNROLL
    for (int i = 0; i < 2 * RT; ++i)
      s.absmax[i / 2][i % 2] = k < a.K ? nf4_scale(p.scale_kind, p.scales, row_of(p, row0, i, lane), k >> 5) : 0;
  } else if (first != 0) {
    return;
  }
  SWIFTK_UNROLL
  for (int i = 0; i < 2 * RT; ++i) s.planes[i / 2][i % 2] = nf4_planes(s.absmax[i / 2][i % 2]);
}

// After `count` words: the next ones come first.
template <int RT, int MT> SWIFTK_HD void shift_codes(int count, Nf4Lane<RT, MT>& s) {
  SWIFTK_UNROLL
  for (int i = 0; i < 2 * RT; ++i)
    SWIFTK_UNROLL
    for (int w = 0; w < 8; ++w)
      if (w + count < 8) s.codes[i / 2][i % 2][w] = s.codes[i / 2][i % 2][w + count];
}

// Where a warp's partial sums lie: (warp, row of x, row of the weight)
template <int RT, int MT> constexpr int kPartials = kLinearWarps * 8 * MT * 16 * RT;
template <int RT, int MT> SWIFTK_HD int partial_at(int warp, int m, int row) { return (warp * 8 * MT + m) * 16 * RT + row; }

template <int RT, int MT> SWIFTK_HD void store_partials(int warp, int lane, const Nf4Lane<RT, MT>& s, float* partials) {
  SWIFTK_UNROLL
  for (int r = 0; r < RT; ++r)
    SWIFTK_UNROLL
    for (int m = 0; m < MT; ++m)
      SWIFTK_UNROLL
      for (int j = 0; j < 4; ++j)
        partials[partial_at<RT, MT>(warp, 8 * m + 2 * (lane % 4) + j % 2, 16 * r + lane / 4 + 8 * (j / 2))] = s.acc[r][m][j];
}

template <int MT> constexpr int kWords = MT == 1 ? 4 : 2;  // of eight, without a branch between them

// Lanes: `each(f)` calls f(lane, its Nf4Lane) for every lane that it has, `mma()` multiplies the operands of all 32 together.
template <int RT, int MT, class Lanes>
SWIFTK_HD void nf4_linear_warp(const Nf4Linear& a, const Nf4Product& p, int64_t row0, int64_t m0, int warp, Lanes& lanes, float* partials) {
  using Lane = Nf4Lane<RT, MT>;
  lanes.each([&](int, Lane& s) {
    SWIFTK_UNROLL
    for (int i = 0; i < RT * MT * 4; ++i) s.acc[i / (MT * 4)][i / 4 % MT][i % 4] = 0;
  });
  for (int k0 = warp * kChunk; k0 < a.K; k0 += kLinearWarps * kChunk) {
    lanes.each([&](int lane, Lane& s) { load_codes(a, p, row0, k0, lane, s); });
    SWIFTK_LOOP  // unrolled, the loads of all eight words were moved to its beginning and took the registers (sm_80, sm_100)
    for (int first = 0; first < 8; first += kWords<MT>) {
      lanes.each([&](int lane, Lane& s) { make_planes(a, p, row0, k0, first, lane, s); });
      SWIFTK_UNROLL
      for (int w = 0; w < kWords<MT>; ++w) {
        lanes.each([&](int lane, Lane& s) { make_operands(a, m0, k0, first, w, lane, s); });
        lanes.mma();
      }
      lanes.each([&](int, Lane& s) { shift_codes(kWords<MT>, s); });
    }
  }
  lanes.each([&](int lane, Lane& s) { store_partials(warp, lane, s, partials); });
}

SWIFTK_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// The sums of the warps, `apart` from each other, by pairs.
SWIFTK_HD float sum_of_warps(const float* partials, int apart) {
  float sum[kLinearWarps];
  SWIFTK_UNROLL
  for (int w = 0; w < kLinearWarps; ++w) sum[w] = partials[w * apart];
  SWIFTK_UNROLL
  for (int step = 1; step < kLinearWarps; step *= 2)
    SWIFTK_UNROLL
    for (int w = 0; w < kLinearWarps; w += 2 * step) sum[w] = add(sum[w], sum[w + step]);
  return sum[0];
}

// After every warp has stored its sums: what a thread adds up, finishes and writes.
template <int RT, int MT>
SWIFTK_HD void nf4_linear_finish(const Nf4Linear& a, const Nf4Product& p, int64_t row0, int64_t m0, int thread, const float* partials) {
  for (int i = thread; i < 16 * RT * 8 * MT; i += 32 * kLinearWarps) {
    const int64_t n = row0 + i % (16 * RT), m = m0 + i / (16 * RT);
    if (n >= p.N || m >= a.M) continue;
    float y = sum_of_warps(partials + i, 8 * MT * 16 * RT);
    for (int r = 0; r < p.rank; ++r) y = fused(widen(p.s[m * p.ld_s + r]), widen(p.t[n * p.ld_t + r]), y);
    if (p.scale != nullptr) y = mul(y, p.scale[n]);
    if (p.bias != nullptr) y = add(y, widen(p.bias[n]));
    if (a.wide) static_cast<float*>(p.y)[m * p.ld_y + n] = y;
    else static_cast<uint16_t*>(p.y)[m * p.ld_y + n] = uint16_t(pack_bf16(y, 0) & 0xffff);
  }
}

// Calls f(RT, MT), as integral constants, with the tile for M rows of x. More rows of x take more rows of the weight with them, so
// that x is read no more often than the codes are.
template <int value> struct Constant {
  static constexpr int v = value;
};
template <class F> void with_linear_tile(int64_t M, F&& f) {
  if (M <= 8) f(Constant<1>{}, Constant<1>{});
  else if (M <= 16) f(Constant<2>{}, Constant<2>{});
  else if (M <= 32) f(Constant<2>{}, Constant<4>{});
  else f(Constant<2>{}, Constant<8>{});
}

// The product and the first of its rows that the x-th block of a grid takes.
SWIFTK_HD int64_t nf4_linear_place(const Nf4Linear& a, int rows, int64_t block, int& product) {
  product = 0;
  while (block >= (a.product[product].N + rows - 1) / rows) block -= (a.product[product].N + rows - 1) / rows, ++product;
  return block * rows;
}
inline int64_t nf4_linear_blocks(const Nf4Linear& a, int rows) {
  int64_t blocks = 0;
  for (int i = 0; i < a.products; ++i) blocks += (a.product[i].N + rows - 1) / rows;
  return blocks;
}

}  // namespace swiftk::gpu
