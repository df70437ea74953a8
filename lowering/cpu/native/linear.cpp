// Linear layers of int8 rows and int8 weights `[N, K]`, by AMX or VNNI dot products.
//
// A thread takes a group of panels of 32 output channels each, puts their weights in the order of the dot product
// instructions (once, which 32 rows and more pay for), and multiplies them with one block of 32 rows after the other: so
// the results of a row are written side by side, which matters more than anything else here. The int32 block never
// leaves the first cache: scales, zero points, outliers and bias are applied there, and the result is rounded once.
//
// Gated: a panel is 16 channels of the gate and the 16 of the up projection that they are multiplied with, so that the
// product, half the size, is all that is written.
#include <algorithm>
#include <vector>

#include "activation.h"
#include "tiles.h"
#include "vector.h"

namespace int8pass {
namespace {

constexpr int64_t PANEL = 32;  // output channels of a panel, in two groups of 16 lanes
constexpr int64_t BLOCK = 32;  // rows of a block
constexpr int64_t DEPTH = 64;  // input channels (bytes) of one tile
constexpr int64_t GROUP_BYTES = 1 << 18;  // packed weights of a group: they stay in the second cache
constexpr int64_t CHUNK = 16 * BLOCK;     // rows a thread takes at least, where there are enough

// ---------------------------------------------------------------------------------------------------------- packing

// `bytes` of up to 16 rows → tiles [depth / 64][16 groups of 4 bytes][16 rows], zeros where there is nothing.
// Consecutive depths are `stride` bytes apart. Every byte is flipped by `flip`.
void pack(const uint8_t* rows, int64_t row_stride, int64_t count, int64_t bytes, uint8_t flip, uint8_t* out,
          int64_t stride) {
  const __m512i flipped = _mm512_set1_epi8(static_cast<char>(flip));
  // Sixteen rows at once are too many streams for the processor to fetch ahead by itself.
  const uint8_t* later = rows + PANEL * row_stride;  // of the next panel
  for (int64_t k = 0; k < bytes; k += DEPTH, out += stride) {
    const int64_t left = bytes - k;
    const __mmask64 mask = left >= DEPTH ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    __m512i r[16];
    for (int64_t n = 0; n < 16; ++n) {
      r[n] = n < count ? _mm512_maskz_loadu_epi8(mask, rows + n * row_stride + k) : _mm512_setzero_si512();
      r[n] = _mm512_xor_si512(r[n], flipped);
    }
    transpose(r);
    for (int64_t i = 0; i < 16; ++i) {
      _mm512_store_si512(out + i * 64, r[i]);
      _mm_prefetch(later + i * 64, _MM_HINT_T1);
    }
    later += TILE;
  }
}

// ---------------------------------------------------------------------------------------------------------- problem

// One call of linear_w8a8, as the threads see it.
struct Problem {
  int64_t m, n, k, depth;  // depth: k up to the next multiple of 64
  const int8_t* codes;
  const float* scale;
  const int32_t* zero;  // or null
  const int8_t* weight;
  const float* weight_scale;
  const int32_t* weight_sum;
  const Tensor* bias;
  std::optional<Activation> gate;  // the first half of the channels gates the second
  Buffer<int8_t> padded;     // rows from `padded_from`, in whole blocks of rows of `depth`
  int64_t padded_from = 0;
  Buffer<int32_t> row_sums;  // without tiles: what the flipped weights add to a row
  bool tiles = use_tiles;

  // Outlier columns: their values as fp32 [m, r], or as bf16 parts [m, parts * r up to 32s] for the tiles.
  int64_t r = 0, parts = 0, bf16_depth = 0;
  const int64_t* columns = nullptr;        // int8 columns of `weight`, or
  const Tensor* outlier_weight = nullptr;  // float weights [n, r]
  Buffer<float> outliers;
  Buffer<uint16_t> bf16_outliers;

  // Numbers in a row of the result, and how many of them a panel gives.
  int64_t outputs() const { return gate ? n / 2 : n; }
  int64_t panel_outputs() const { return gate ? 16 : PANEL; }

  // A block of rows with the distance between rows, all of it readable.
  const int8_t* rows(int64_t m0, int64_t* stride) const {
    *stride = m0 >= padded_from ? depth : k;
    return m0 >= padded_from ? padded + (m0 - padded_from) * depth : codes + m0 * k;
  }
};

void pad_rows(Problem& p) {
  p.padded_from = p.k % DEPTH ? 0 : p.m / BLOCK * BLOCK;
  const int64_t count = p.m - p.padded_from, blocks = round_up(count, BLOCK);
  if (!count) return;
  p.padded = Buffer<int8_t>(blocks * p.depth);
  for (int64_t m = 0; m < blocks; ++m) {
    int8_t* to = p.padded + m * p.depth;
    const int64_t filled = m < count ? p.k : 0;
    if (filled) std::memcpy(to, p.codes + (p.padded_from + m) * p.k, filled);
    std::memset(to + filled, 0, p.depth - filled);
  }
}

// VNNI multiplies unsigned with signed bytes. The weights are the unsigned ones (128 added to each), so a row's result
// is too large by 128 times the sum of its codes.
void sum_rows(Problem& p) {
  p.row_sums = Buffer<int32_t>(p.m);
  for (int64_t m = 0; m < p.m; ++m) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < p.k; k += DEPTH) {
      const __mmask64 mask = p.k - k >= DEPTH ? ~__mmask64{0} : (__mmask64{1} << (p.k - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, p.codes + m * p.k + k));
    }
    p.row_sums[m] = 128 * _mm512_reduce_add_epi32(sum);
  }
}

// bf16 parts whose sum is the number: one for a bf16, two for an fp16, three for an fp32.
void split_bf16(const float* from, int64_t count, int64_t parts, uint16_t* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = lanes(count - i);
    __m512 rest = _mm512_maskz_loadu_ps(mask, from + i);
    for (int64_t part = 0; part < parts; ++part) {
      const __m256i rounded = to_bf16(rest);
      _mm256_mask_storeu_epi16(to + part * count + i, mask, rounded);
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      // What is left of an infinity is nothing, not NaN.
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(value, value), _mm512_setzero_ps(), _CMP_EQ_OQ);
      rest = _mm512_maskz_sub_ps(finite, rest, value);
    }
  }
}

void read_outliers(Problem& p, const Tensor& outliers) {
  p.r = outliers.size(outliers.dim() - 1);
  if (!p.r) return;
  p.outliers = Buffer<float>(p.m * p.r + LANES);
  read_floats(outliers, 0, p.m * p.r, p.outliers);
  const bool exact = p.columns || p.outlier_weight->scalar_type() == ScalarType::BFloat16;
  if (!p.tiles || !exact) return;
  const ScalarType dtype = outliers.scalar_type();
  p.parts = dtype == ScalarType::BFloat16 ? 1 : dtype == ScalarType::Half ? 2 : 3;
  p.bf16_depth = round_up(p.parts * p.r, 32);
  p.bf16_outliers = Buffer<uint16_t>(round_up(p.m, BLOCK) * p.bf16_depth);
  std::memset(p.bf16_outliers, 0, round_up(p.m, BLOCK) * p.bf16_depth * 2);
  torch::stable::parallel_for(0, p.m, 512, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      split_bf16(p.outliers + m * p.r, p.r, p.parts, p.bf16_outliers + m * p.bf16_depth);
    }
  });
}

// ------------------------------------------------------------------------------------------------------------ panel

// 32 output channels: packed weights and everything the epilogue needs of them.
struct Panel {
  struct Channels {
    int64_t first, count;
  };
  explicit Panel(const Problem& p)
      : codes(PANEL * p.depth), outliers(p.r ? PANEL * p.r : 0), bf16_outliers(PANEL * p.bf16_depth * 2) {}
  int64_t first = 0, width = 0;     // of the result
  Channels groups[2] = {};          // the rows of the weight in its two groups of lanes
  Buffer<uint8_t> codes;            // [depth / 64][2][16][16][4]
  Buffer<float> outliers;           // [r][32]
  Buffer<uint8_t> bf16_outliers;    // [bf16_depth / 32][2][16][16][2]
  alignas(64) float scale[PANEL], bias[PANEL];
  alignas(64) int32_t sums[PANEL];
};

// Column `k` of 16 packed channels as fp32.
inline __m512 packed_column(const Problem& p, const Panel& panel, int64_t k, int64_t group) {
  const uint8_t* at = panel.codes + (k / DEPTH) * 2 * TILE + group * TILE + (k % DEPTH) / 4 * 64;
  const __m512i flip = _mm512_set1_epi32(p.tiles ? 0 : 0x80808080);
  const __m512i fours = _mm512_xor_si512(_mm512_load_si512(at), flip);
  const __m512i byte = _mm512_sll_epi32(fours, _mm_cvtsi32_si128(static_cast<int>(24 - 8 * (k % 4))));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(byte, 24));
}

// The columns as fp32 [r][32]; as bf16 (exact) in the order of the tiles, once for every part of the values.
void pack_outliers(const Problem& p, Panel& panel) {
  if (p.columns) {
    for (int64_t r = 0; r < p.r; ++r) {
      _mm512_store_ps(panel.outliers + r * PANEL, packed_column(p, panel, p.columns[r], 0));
      _mm512_store_ps(panel.outliers + r * PANEL + 16, packed_column(p, panel, p.columns[r], 1));
    }
  } else {
    Buffer<float> row(round_up(p.r, LANES));
    std::memset(panel.outliers, 0, p.r * PANEL * sizeof(float));
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const auto [first, count] = panel.groups[lane / 16];
      if (lane % 16 >= count) continue;
      read_floats(*p.outlier_weight, (first + lane % 16) * p.r, p.r, row);
      for (int64_t r = 0; r < p.r; ++r) panel.outliers[r * PANEL + lane] = row[r];
    }
  }
  for (int64_t pair = 0; pair < p.bf16_depth / 2; ++pair) {
    for (int64_t group = 0; group < 2; ++group) {
      __m512i halves[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = 2 * pair + i;
        const bool inside = at < p.parts * p.r;
        halves[i] = inside ? _mm512_load_si512(panel.outliers + at % p.r * PANEL + group * 16) : _mm512_setzero_si512();
      }
      const __m512i both = _mm512_or_si512(_mm512_srli_epi32(halves[0], 16), halves[1]);
      uint8_t* to = panel.bf16_outliers + (pair / 16 * 2 + group) * TILE + pair % 16 * 64;
      _mm512_store_si512(to, both);
    }
  }
}

void fill(const Problem& p, Panel& panel, int64_t first) {
  panel.first = first;
  panel.width = std::min(p.panel_outputs(), p.outputs() - first);
  std::fill_n(panel.scale, PANEL, 0.0f);
  std::fill_n(panel.bias, PANEL, 0.0f);
  std::fill_n(panel.sums, PANEL, 0);
  const auto* weight = reinterpret_cast<const uint8_t*>(p.weight);
  for (int64_t group = 0; group < 2; ++group) {
    const int64_t channel = first + group * (p.gate ? p.n / 2 : 16), lane = group * 16;
    const int64_t count = p.gate ? panel.width : std::clamp<int64_t>(panel.width - lane, 0, 16);
    panel.groups[group] = {channel, count};
    pack(weight + channel * p.k, p.k, count, p.k, p.tiles ? 0 : 0x80, panel.codes + group * TILE, 2 * TILE);
    std::copy_n(p.weight_scale + channel, count, panel.scale + lane);
    if (p.zero) std::copy_n(p.weight_sum + channel, count, panel.sums + lane);
    if (p.bias) read_floats(*p.bias, channel, count, panel.bias + lane);
  }
  if (p.r) pack_outliers(p, panel);
}

// --------------------------------------------------------------------------------------------------------- products

// A block of 32 rows times a panel, before scales: the int8 part, and where the outlier part is.
struct Block {
  const Panel* panel = nullptr;
  int64_t m0 = 0;
  const float* part = nullptr;
  alignas(64) int32_t acc[BLOCK * PANEL];
};

#ifdef INT8PASS_AMX
// Tile numbers are part of the instructions, so these cannot be functions. Tiles 0 to 3 add up 32 x 32 results.
#define INT8PASS_CLEAR() \
  do {                    \
    _tile_zero(0);        \
    _tile_zero(1);        \
    _tile_zero(2);        \
    _tile_zero(3);        \
  } while (0)
#define INT8PASS_STEP(MULTIPLY, A, A_STRIDE, B)   \
  do {                                             \
    _tile_loadd(6, B, 64);                         \
    _tile_loadd(7, (B) + TILE, 64);                \
    _tile_loadd(4, A, A_STRIDE);                   \
    MULTIPLY(0, 4, 6);                             \
    MULTIPLY(1, 4, 7);                             \
    if (two) {                                     \
      _tile_loadd(5, (A) + 16 * (A_STRIDE), A_STRIDE); \
      MULTIPLY(2, 5, 6);                           \
      MULTIPLY(3, 5, 7);                           \
    }                                              \
  } while (0)
#define INT8PASS_STORE(OUT)                        \
  do {                                             \
    _tile_stored(0, OUT, PANEL * 4);               \
    _tile_stored(1, (OUT) + 16, PANEL * 4);        \
    if (two) {                                     \
      _tile_stored(2, (OUT) + 16 * PANEL, PANEL * 4); \
      _tile_stored(3, (OUT) + 16 * PANEL + 16, PANEL * 4); \
    }                                              \
  } while (0)

// The multiplier works for itself: `between(step, steps)` runs beside it.
template <class F>
void multiply_tiles(const Problem& p, Block& block, const F& between) {
  int64_t stride;
  const int8_t* rows = p.rows(block.m0, &stride);
  const bool two = p.m - block.m0 > 16;
  const int64_t steps = p.depth / DEPTH;
  const uint8_t* weights = block.panel->codes;
  INT8PASS_CLEAR();
  for (int64_t s = 0; s < steps; ++s) {
    INT8PASS_STEP(_tile_dpbssd, rows + s * DEPTH, stride, weights + 2 * s * TILE);
    between(s, steps);
  }
  INT8PASS_STORE(block.acc);
}

void multiply_outlier_tiles(const Problem& p, const Panel& panel, int64_t m0, float* part) {
  const int64_t width = p.bf16_depth * 2;
  const bool two = p.m - m0 > 16;
  const auto* left = reinterpret_cast<const uint8_t*>(p.bf16_outliers + m0 * p.bf16_depth);
  const uint8_t* right = panel.bf16_outliers;
  INT8PASS_CLEAR();
  for (int64_t s = 0; s < p.bf16_depth / 32; ++s) {
    INT8PASS_STEP(_tile_dpbf16ps, left + s * DEPTH, width, right + 2 * s * TILE);
  }
  INT8PASS_STORE(part);
}
#undef INT8PASS_CLEAR
#undef INT8PASS_STEP
#undef INT8PASS_STORE
#else
template <class F>
void multiply_tiles(const Problem&, Block&, const F&) {}
void multiply_outlier_tiles(const Problem&, const Panel&, int64_t, float*) {}
#endif

constexpr int64_t STRIP = 8;  // rows whose sums stay in registers

void multiply_vectors(const Problem& p, Block& block) {
  int64_t stride;
  const int8_t* rows = p.rows(block.m0, &stride);
  for (int64_t m = 0; m < std::min(BLOCK, p.m - block.m0); m += STRIP) {
    __m512i sums[STRIP][2] = {};
    for (int64_t k = 0; k < p.depth; k += 4) {
      const uint8_t* at = block.panel->codes + (k / DEPTH) * 2 * TILE + (k % DEPTH) * 16;
      const __m512i left = _mm512_load_si512(at), right = _mm512_load_si512(at + TILE);
      for (int64_t i = 0; i < STRIP; ++i) {
        int32_t four;
        std::memcpy(&four, rows + (m + i) * stride + k, 4);
        const __m512i codes = _mm512_set1_epi32(four);
        sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], left, codes);
        sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], right, codes);
      }
    }
    for (int64_t i = 0; i < STRIP && block.m0 + m + i < p.m; ++i) {
      const __m512i extra = _mm512_set1_epi32(p.row_sums[block.m0 + m + i]);
      int32_t* to = block.acc + (m + i) * PANEL;
      _mm512_store_si512(to, _mm512_sub_epi32(sums[i][0], extra));
      _mm512_store_si512(to + 16, _mm512_sub_epi32(sums[i][1], extra));
    }
  }
}

void multiply_outliers(const Problem& p, const Panel& panel, int64_t m0, float* part) {
  for (int64_t m = 0; m < std::min(BLOCK, p.m - m0); ++m) {
    __m512 left = _mm512_setzero_ps(), right = _mm512_setzero_ps();
    const float* row = p.outliers + (m0 + m) * p.r;
    for (int64_t r = 0; r < p.r; ++r) {
      const __m512 x = _mm512_set1_ps(row[r]);
      left = _mm512_fmadd_ps(x, _mm512_load_ps(panel.outliers + r * PANEL), left);
      right = _mm512_fmadd_ps(x, _mm512_load_ps(panel.outliers + r * PANEL + 16), right);
    }
    _mm512_store_ps(part + m * PANEL, left);
    _mm512_store_ps(part + m * PANEL + 16, right);
  }
}

// --------------------------------------------------------------------------------------------------------- epilogue

enum class Outliers { NONE, COLUMNS, OWN_WEIGHTS };

// Scales, zero points, outliers, bias and gate of one block. What a call has of them is known to the compiler, and what
// the loop over the rows needs is loaded once and stays in registers: this must fit beside the tiles' own instructions.
template <class T, bool ZERO, Outliers OUTLIERS, bool GATED>
class Finish {
 public:
  Finish(const Problem& p, const Block& block, T* out)
      : block_(block),
        rows_(block.panel ? std::min(BLOCK, p.m - block.m0) : 0),
        width_(p.outputs()),
        scales_(p.scale + block.m0),
        zeros_(p.zero + (ZERO ? block.m0 : 0)) {
    if (!rows_) return;
    const Panel& panel = *block.panel;
    to_ = out + block.m0 * width_ + panel.first;
    mask_ = panel.width >= PANEL ? ~__mmask32{0} : (__mmask32{1} << panel.width) - 1;
    if constexpr (GATED) activation_ = *p.gate;
    for (int64_t group = 0; group < 2; ++group) {
      weight_scale_[group] = _mm512_load_ps(panel.scale + group * 16);
      bias_[group] = _mm512_load_ps(panel.bias + group * 16);
      sums_[group] = _mm512_load_si512(panel.sums + group * 16);
    }
  }

  // The part of the rows that is due at a step of several.
  [[gnu::always_inline]] void operator()(int64_t step, int64_t steps) const {
    const int64_t end = std::min(rows_, BLOCK * (step + 1) / steps);
    for (int64_t i = BLOCK * step / steps; i < end; ++i) row(i);
  }

 private:
  [[gnu::always_inline]] void row(int64_t i) const {
    const __m512 scale = _mm512_set1_ps(scales_[i]);
    __m512 y[2];
    for (int64_t group = 0; group < 2; ++group) {
      const int64_t at = i * PANEL + group * 16;
      __m512i acc = _mm512_load_si512(block_.acc + at);
      if constexpr (ZERO) acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_set1_epi32(zeros_[i]), sums_[group]));
      y[group] = _mm512_cvtepi32_ps(acc);
      if constexpr (OUTLIERS == Outliers::COLUMNS) {  // in units of the weight's scale, as the codes are
        y[group] = _mm512_fmadd_ps(y[group], scale, _mm512_load_ps(block_.part + at));
      } else {
        y[group] = _mm512_mul_ps(y[group], scale);
      }
      y[group] = _mm512_fmadd_ps(y[group], weight_scale_[group], bias_[group]);
      if constexpr (OUTLIERS == Outliers::OWN_WEIGHTS) {
        y[group] = _mm512_add_ps(y[group], _mm512_load_ps(block_.part + at));
      }
    }
    T* to = to_ + i * width_;
    // The line that the next panel writes: its owner is asked for it while this one is at work.
    __builtin_prefetch(reinterpret_cast<char*>(to) + 64, 1);
    if constexpr (GATED) {
      store(to, static_cast<__mmask16>(mask_), _mm512_mul_ps(activate<T>(activation_, y[0]), y[1]));
    } else {
      store(to, mask_, y[0], y[1]);
    }
  }

  const Block& block_;
  const int64_t rows_, width_;
  const float* scales_;
  const int32_t* zeros_;
  T* to_ = nullptr;
  __mmask32 mask_ = 0;
  Activation activation_ = Activation::RELU;
  __m512 weight_scale_[2], bias_[2];
  __m512i sums_[2];
};

// A group of panels times the rows from `first` to `last`. Each block is finished while the next one is multiplied.
template <class T, bool ZERO, Outliers OUTLIERS, bool GATED>
void run_group(const Problem& p, const std::vector<Panel>& panels, int64_t count, int64_t first, int64_t last, T* out) {
  using FinishBlock = Finish<T, ZERO, OUTLIERS, GATED>;
  Block blocks[2];
  Block *now = &blocks[0], *before = &blocks[1];
  Buffer<float> parts(p.r ? count * BLOCK * PANEL : 0);
  for (int64_t m0 = first; m0 < last; m0 += BLOCK) {
    if constexpr (OUTLIERS != Outliers::NONE) {
      // A product of a tile or two is over before its result can be stored: those of all panels follow each other.
      const FinishBlock finish(p, *before, out);
      for (int64_t i = 0; i < count; ++i) {
        finish(i, count);  // the block that waits reads the last part, which is written last
        float* part = parts + i * BLOCK * PANEL;
        p.bf16_depth ? multiply_outlier_tiles(p, panels[i], m0, part) : multiply_outliers(p, panels[i], m0, part);
      }
      before->panel = nullptr;
    }
    for (int64_t i = 0; i < count; ++i) {
      now->panel = &panels[i];
      now->m0 = m0;
      now->part = parts + i * BLOCK * PANEL;
      const FinishBlock finish(p, *before, out);
      if (p.tiles) {
        multiply_tiles(p, *now, finish);
      } else {
        finish(0, 1);
        multiply_vectors(p, *now);
      }
      std::swap(now, before);
    }
  }
  FinishBlock(p, *before, out)(0, 1);
}

template <class T>
using RunGroup = void (*)(const Problem&, const std::vector<Panel>&, int64_t, int64_t, int64_t, T*);

template <class T, bool GATED>
RunGroup<T> with_outliers(const Problem& p) {
  if (!p.r) return p.zero ? run_group<T, true, Outliers::NONE, GATED> : run_group<T, false, Outliers::NONE, GATED>;
  if (p.columns) {
    return p.zero ? run_group<T, true, Outliers::COLUMNS, GATED> : run_group<T, false, Outliers::COLUMNS, GATED>;
  }
  return p.zero ? run_group<T, true, Outliers::OWN_WEIGHTS, GATED> : run_group<T, false, Outliers::OWN_WEIGHTS, GATED>;
}

template <class T>
void run(const Problem& p, T* out) {
  const int64_t threads = torch::stable::get_num_threads(), panels = ceil_div(p.outputs(), p.panel_outputs());
  const int64_t most = std::max<int64_t>(1, GROUP_BYTES / (PANEL * p.depth));
  // Every thread takes as many groups of panels as the others, and only where there are too few panels, pieces of rows.
  const int64_t rounds = ceil_div(panels, threads * most), group = ceil_div(panels, threads * rounds);
  const int64_t groups = ceil_div(panels, group);
  const int64_t chunks = std::clamp<int64_t>(ceil_div(threads, groups), 1, ceil_div(p.m, CHUNK));
  const int64_t chunk = round_up(ceil_div(p.m, chunks), BLOCK);
  const RunGroup<T> group_of_panels = p.gate ? with_outliers<T, true>(p) : with_outliers<T, false>(p);
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Panel> packed;
    for (int64_t i = 0; i < group; ++i) packed.emplace_back(p);
    const Tiles tiles(p.tiles);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first_panel = item / chunks * group, first_row = item % chunks * chunk;
      const int64_t count = std::min(group, panels - first_panel);
      // Pieces of rows of one group follow each other.
      for (int64_t i = 0; (item == begin || item % chunks == 0) && i < count; ++i) {
        fill(p, packed[i], (first_panel + i) * p.panel_outputs());
      }
      if (first_row < p.m) group_of_panels(p, packed, count, first_row, std::min(first_row + chunk, p.m), out);
    }
  });
}

Tensor multiply(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& weight,
                const Tensor& weight_scale, const std::optional<Tensor>& weight_sum, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& outliers, const std::optional<Tensor>& outlier_weight,
                const std::optional<Tensor>& columns, ScalarType dtype, std::optional<Activation> gate) {
  Problem p;
  p.m = row_count(codes), p.n = weight.size(0), p.k = weight.size(1), p.depth = round_up(p.k, DEPTH);
  p.gate = gate;
  Tensor out = empty_like_rows(codes, p.outputs(), dtype);
  if (!p.m || !p.outputs()) return out;
  p.codes = static_cast<const int8_t*>(codes.data_ptr());
  p.scale = static_cast<const float*>(scale.data_ptr());
  p.zero = zero_point ? static_cast<const int32_t*>(zero_point->data_ptr()) : nullptr;
  p.weight = static_cast<const int8_t*>(weight.data_ptr());
  p.weight_scale = static_cast<const float*>(weight_scale.data_ptr());
  p.weight_sum = weight_sum ? static_cast<const int32_t*>(weight_sum->data_ptr()) : nullptr;
  p.bias = bias ? &*bias : nullptr;
  p.columns = columns ? static_cast<const int64_t*>(columns->data_ptr()) : nullptr;
  p.outlier_weight = outlier_weight ? &*outlier_weight : nullptr;
  pad_rows(p);
  if (!p.tiles) sum_rows(p);
  if (outliers) read_outliers(p, *outliers);
  for_float_type(dtype, [&](auto* type) { run(p, static_cast<decltype(type)>(out.data_ptr())); });
  return out;
}

}  // namespace

Tensor linear_w8a8(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& weight_sum,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& outliers,
                   const std::optional<Tensor>& outlier_weight, const std::optional<Tensor>& columns,
                   ScalarType dtype) {
  return multiply(codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns,
                  dtype, std::nullopt);
}

Tensor gated_linear(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                    const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& weight_sum,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& outliers,
                    const std::optional<Tensor>& outlier_weight, const std::optional<Tensor>& columns,
                    ScalarType dtype, std::string act) {
  return multiply(codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns,
                  dtype, activation_of(act));
}

STABLE_TORCH_LIBRARY_IMPL(int8pass_cpu, CPU, library) {
  library.impl("linear_w8a8", TORCH_BOX(&linear_w8a8));
  library.impl("gated_linear", TORCH_BOX(&gated_linear));
}

}  // namespace int8pass
