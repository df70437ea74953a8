// softmax(Q Kᵀ · scale + mask) V in bf16 with fp32 sums, by AMX tiles.
//
// Keys and values are put in the order of the tiles once per head of theirs. A thread then takes 32 queries of a head
// and up to 256 keys at a time: the scores stay in its first cache, blocks of 32 x 32 that the mask hides altogether
// are never multiplied, and later keys rescale what the earlier ones gave (Dao et al., arXiv 2205.14135, algorithm 1).
#include <cmath>
#include <limits>

#include "tiles.h"

namespace int8pass {
#ifdef INT8PASS_AMX
namespace {

constexpr int64_t BLOCK = 32;         // queries, and keys, of a block: two tiles
constexpr int64_t CHUNK = 256;        // keys whose scores are held at a time: with the weights, the first cache
constexpr int64_t PAIRS = 32;         // bf16 numbers in a row of a tile
constexpr int64_t SCORES = CHUNK + 16;  // floats from one row of scores to the next: rows of a tile in different sets
constexpr int64_t WEIGHTS = CHUNK + PAIRS;

enum Visible : uint8_t { NONE, SOME, ALL };

// A [B, H, T, D] tensor of bf16 whose channels lie side by side.
struct Heads {
  explicit Heads(const Tensor& x)
      : data(static_cast<const BF16*>(x.data_ptr())), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}
  const BF16* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * row; }

  const BF16* data;
  int64_t batch, head, row;
};

// `x`, or a copy whose last axis is side by side.
inline Tensor with_rows(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x); }

// A [B or 1, H or 1, T or 1, S] tensor of bools or floats; a size of 1 stands for any.
struct Mask {
  explicit Mask(const Tensor& x)
      : data(const_cast<void*>(x.data_ptr())), dtype(x.scalar_type()), batches(x.size(0)), heads(x.size(1)),
        rows(x.size(2)), batch(step(x, 0)), head(step(x, 1)), row(step(x, 2)) {}
  static int64_t step(const Tensor& x, int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); }
  // Of the element for key 0.
  int64_t offset(int64_t b, int64_t h, int64_t query) const { return b * batch + h * head + query * row; }

  const void* data;
  ScalarType dtype;
  int64_t batches, heads, rows, batch, head, row;
};

struct Problem {
  int64_t batches, heads, groups, queries, keys, depth, width;  // groups: heads that keys and values have
  Heads q, k, v;
  std::optional<Mask> mask;
  bool causal;
  float scale;

  int64_t depth_tiles = ceil_div(depth, PAIRS), width_tiles = 2 * ceil_div(width, PAIRS);
  int64_t key_blocks = ceil_div(keys, BLOCK), query_blocks = ceil_div(queries, BLOCK);
  Buffer<BF16> packed_k{batches * groups * key_blocks * 2 * depth_tiles * TILE / 2};
  Buffer<BF16> packed_v{batches * groups * key_blocks * width_tiles * TILE / 2};
  Buffer<uint8_t> visible{mask ? mask->batches * mask->heads * query_blocks * key_blocks : 0};

  BF16* k_tiles(int64_t head, int64_t block) {
    return packed_k + (head * key_blocks + block) * 2 * depth_tiles * TILE / 2;
  }
  BF16* v_tiles(int64_t head, int64_t block) { return packed_v + (head * key_blocks + block) * width_tiles * TILE / 2; }
};

// ---------------------------------------------------------------------------------------------------------- packing

inline __mmask32 pairs(int64_t count) {
  return count >= PAIRS ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// 32 keys → tiles [2 halves][depth / 32][16 pairs of channels][16 keys][2], zeros where there is nothing.
void pack_keys(const Problem& p, int64_t b, int64_t group, int64_t block, BF16* out) {
  for (int64_t first = block * BLOCK; first < (block + 1) * BLOCK; first += 16) {
    for (int64_t d = 0; d < p.depth; d += PAIRS, out += TILE / 2) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const bool there = first + i < p.keys;
        r[i] = there ? _mm512_maskz_loadu_epi16(pairs(p.depth - d), p.k.at(b, group, first + i) + d)
                     : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + i * PAIRS, r[i]);
    }
  }
}

// 32 values → tiles [width / 16][16 pairs of keys][16 channels][2], zeros where there is nothing.
void pack_values(const Problem& p, int64_t b, int64_t group, int64_t block, BF16* out) {
  alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t pair = 0; pair < 16; ++pair) {
    const int64_t key = block * BLOCK + 2 * pair;
    for (int64_t d = 0; d < p.width_tiles * 16; d += PAIRS) {
      const auto row = [&](int64_t t) {
        return t < p.keys ? _mm512_maskz_loadu_epi16(pairs(p.width - d), p.v.at(b, group, t) + d)
                          : _mm512_setzero_si512();
      };
      const __m512i first = row(key), second = row(key + 1);
      BF16* to = out + d / 16 * (TILE / 2) + pair * PAIRS;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
      _mm512_store_si512(to + TILE / 2, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- mask

// Sixteen elements of a mask from `at` on, as what is added to a score.
template <class T>
inline __m512 added(const T* at, __mmask16 mask) {
  return load(at, mask);
}
inline __m512 added(const bool* at, __mmask16 mask) {
  const __m128i seen = _mm_maskz_loadu_epi8(mask, at);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(seen, seen), _mm512_setzero_ps());
}

// Calls `f` with the mask's elements, of one of the types it may have.
template <class F>
void for_mask_type(const Mask& mask, const F& f) {
  if (mask.dtype == ScalarType::Bool) return f(static_cast<const bool*>(mask.data));
  for_float_type(mask.dtype, [&](auto* type) { f(static_cast<std::remove_pointer_t<decltype(type)> const*>(mask.data)); });
}

// What a mask lets be seen of every block of 32 queries `query_block` and 32 keys.
void classify(Problem& p, int64_t b, int64_t h, int64_t query_block) {
  uint8_t* out = p.visible + ((b * p.mask->heads + h) * p.query_blocks + query_block) * p.key_blocks;
  const int64_t first = query_block * BLOCK;
  const int64_t last = p.mask->rows == 1 ? first + 1 : std::min(first + BLOCK, p.queries);
  for_mask_type(*p.mask, [&](const auto* mask) {
    for (int64_t block = 0; block < p.key_blocks; ++block) {
      __mmask16 seen = 0, changed = 0;
      for (int64_t key = block * BLOCK; key < std::min((block + 1) * BLOCK, p.keys); key += LANES) {
        const __mmask16 there = lanes(p.keys - key);
        for (int64_t query = first; query < last; ++query) {
          const __m512 value = added(mask + p.mask->offset(b, h, query) + key, there);
          seen |= _mm512_mask_cmp_ps_mask(there, value, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
          changed |= _mm512_mask_cmp_ps_mask(there, value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        }
      }
      out[block] = !seen ? NONE : changed ? SOME : ALL;
    }
  });
}

Visible visibility(const Problem& p, int64_t b, int64_t h, int64_t query_block, int64_t block) {
  if (p.causal && block > query_block) return NONE;
  Visible seen = ALL;
  if (p.mask) {
    const int64_t matrix = (p.mask->batches > 1 ? b * p.mask->heads : 0) + (p.mask->heads > 1 ? h : 0);
    seen = static_cast<Visible>(p.visible[(matrix * p.query_blocks + query_block) * p.key_blocks + block]);
  }
  const bool edge = (p.causal && block == query_block) || (block + 1) * BLOCK > p.keys;
  return seen == ALL && edge ? SOME : seen;
}

// Add the mask to the scores [32 queries, 32 keys] of a block, before they are scaled.
void hide(const Problem& p, int64_t b, int64_t h, int64_t query_block, int64_t block, float* scores) {
  const __m512 unscaled = _mm512_set1_ps(1.0f / p.scale), never = _mm512_set1_ps(-INFINITY);
  const auto rows = [&](const auto& add) {
    for (int64_t i = 0; i < BLOCK; ++i, scores += SCORES) {
      const int64_t query = std::min(query_block * BLOCK + i, p.queries - 1);  // rows behind the last: that one again
      const int64_t keys = p.causal ? std::min(p.keys, query + 1) : p.keys;
      for (int64_t key = block * BLOCK; key < (block + 1) * BLOCK; key += LANES) {
        const __mmask16 there = keys > key ? lanes(keys - key) : 0;
        float* to = scores + key - block * BLOCK;
        _mm512_store_ps(to, _mm512_mask_mov_ps(never, there, add(_mm512_load_ps(to), query, key, there)));
      }
    }
  };
  if (!p.mask) return rows([](__m512 score, int64_t, int64_t, __mmask16) { return score; });
  for_mask_type(*p.mask, [&](const auto* mask) {
    rows([&](__m512 score, int64_t query, int64_t key, __mmask16 there) {
      return _mm512_fmadd_ps(added(mask + p.mask->offset(b, h, query) + key, there), unscaled, score);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 0, to 4e-5 of it; NaN stays NaN. 0 in place of denormals, each of which would cost a hundred cycles.
inline __m512 exp2(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(0.0096181291f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0555041087f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.2402265070f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6931471806f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, y, whole);
}

// What a thread holds of 32 queries.
struct Workspace {
  explicit Workspace(const Problem& p)
      : q(BLOCK * p.depth_tiles * PAIRS), scores(BLOCK * SCORES), weights(BLOCK * WEIGHTS), out(BLOCK * p.width_tiles * 16) {}
  Buffer<BF16> q;         // [32, depth], zeros behind the last query and channel
  Buffer<float> scores;   // [32, 256]
  Buffer<BF16> weights;   // exp of them
  Buffer<float> out;      // [32, width], not yet divided by the sums
  float largest[BLOCK], sums[BLOCK];
  std::vector<int64_t> blocks;    // of keys in this chunk, those that are seen
  std::vector<Visible> seen;
};

// Scores → weights relative to the largest score so far, and their sums. Earlier results shrink accordingly.
void soften(const Problem& p, Workspace& w, bool first) {
  const float unit = p.scale * 1.44269504f;  // scores are exponents of 2
  const int64_t count = static_cast<int64_t>(w.blocks.size()) * BLOCK, width = p.width_tiles * 16;
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float* scores = w.scores + i * SCORES;
    __m512 most[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    for (int64_t j = 0; j < count; j += 2 * LANES) {
      most[0] = _mm512_max_ps(most[0], _mm512_load_ps(scores + j));
      most[1] = _mm512_max_ps(most[1], _mm512_load_ps(scores + j + LANES));
    }
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]));
    if (!first) largest = std::max(largest, w.largest[i]);
    // A row in which nothing is seen has weights of 0, and so have the earlier keys of one that saw nothing yet.
    const float shift = largest == -INFINITY ? 0.0f : largest * unit;
    const __m512 units = _mm512_set1_ps(unit), shifts = _mm512_set1_ps(shift);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    BF16* weights = w.weights + i * WEIGHTS;
    for (int64_t j = 0; j < count; j += 2 * LANES) {
      const __m512 left = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + j), units, shifts));
      const __m512 right = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + j + LANES), units, shifts));
      sums[0] = _mm512_add_ps(sums[0], left), sums[1] = _mm512_add_ps(sums[1], right);
      _mm512_store_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
    float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    if (!first) {
      const float shrink = w.largest[i] == -INFINITY ? 0.0f : std::exp2(w.largest[i] * unit - shift);
      sum += w.sums[i] * shrink;
      if (shrink != 1.0f) {
        for (int64_t d = 0; d < width; d += LANES) {
          float* to = w.out + i * width + d;
          _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), _mm512_set1_ps(shrink)));
        }
      }
    }
    w.largest[i] = largest, w.sums[i] = sum;
  }
}

// --------------------------------------------------------------------------------------------------------- products

// Scores of 32 queries and the chunk's blocks of keys.
void multiply_keys(Problem& p, Workspace& w, int64_t head) {
  const int64_t q_bytes = p.depth_tiles * PAIRS * sizeof(BF16), s_bytes = SCORES * sizeof(float);
  const BF16* lower = w.q + 16 * p.depth_tiles * PAIRS;
  for (size_t j = 0; j < w.blocks.size(); ++j) {
    const BF16* left = p.k_tiles(head, w.blocks[j]);
    const BF16* right = left + p.depth_tiles * TILE / 2;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t d = 0; d < p.depth_tiles; ++d) {
      _tile_loadd(4, w.q + d * PAIRS, q_bytes);
      _tile_loadd(6, left + d * (TILE / 2), 64);
      _tile_loadd(7, right + d * (TILE / 2), 64);
      _tile_loadd(5, lower + d * PAIRS, q_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* to = w.scores + j * BLOCK;
    _tile_stored(0, to, s_bytes);
    _tile_stored(1, to + 16, s_bytes);
    _tile_stored(2, to + 16 * SCORES, s_bytes);
    _tile_stored(3, to + 16 * SCORES + 16, s_bytes);
  }
}

// Weights times values, on top of what earlier chunks gave.
void multiply_values(Problem& p, Workspace& w, int64_t head, bool first) {
  const int64_t width = p.width_tiles * 16, bytes = width * sizeof(float), w_bytes = WEIGHTS * sizeof(BF16);
  for (int64_t d = 0; d < p.width_tiles; d += 2) {
    float* to = w.out + d * 16;
    if (first) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
      _tile_loadd(0, to, bytes);
      _tile_loadd(1, to + 16, bytes);
      _tile_loadd(2, to + 16 * width, bytes);
      _tile_loadd(3, to + 16 * width + 16, bytes);
    }
    for (size_t j = 0; j < w.blocks.size(); ++j) {
      const BF16* values = p.v_tiles(head, w.blocks[j]) + d * (TILE / 2);
      _tile_loadd(4, w.weights + j * BLOCK, w_bytes);
      _tile_loadd(6, values, 64);
      _tile_loadd(7, values + TILE / 2, 64);
      _tile_loadd(5, w.weights + 16 * WEIGHTS + j * BLOCK, w_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, bytes);
    _tile_stored(1, to + 16, bytes);
    _tile_stored(2, to + 16 * width, bytes);
    _tile_stored(3, to + 16 * width + 16, bytes);
  }
}

void attend(Problem& p, Workspace& w, int64_t b, int64_t h, int64_t query_block, BF16* out) {
  const int64_t head = b * p.groups + h / (p.heads / p.groups), row = p.depth_tiles * PAIRS;
  const int64_t count = std::min(BLOCK, p.queries - query_block * BLOCK);
  for (int64_t i = 0; i < BLOCK; ++i) {
    for (int64_t d = 0; d < row; d += PAIRS) {
      const __mmask32 there = i < count ? pairs(p.depth - d) : 0;
      const BF16* from = p.q.at(b, h, query_block * BLOCK + (there ? i : 0)) + d;
      _mm512_store_si512(w.q + i * row + d, _mm512_maskz_loadu_epi16(there, from));
    }
  }
  bool first = true;
  for (int64_t chunk = 0; chunk < p.key_blocks; chunk += CHUNK / BLOCK) {
    w.blocks.clear(), w.seen.clear();
    for (int64_t block = chunk; block < std::min(chunk + CHUNK / BLOCK, p.key_blocks); ++block) {
      const Visible seen = visibility(p, b, h, query_block, block);
      if (seen != NONE) w.blocks.push_back(block), w.seen.push_back(seen);
    }
    if (w.blocks.empty()) continue;
    multiply_keys(p, w, head);
    for (size_t j = 0; j < w.blocks.size(); ++j) {
      if (w.seen[j] == SOME) hide(p, b, h, query_block, w.blocks[j], w.scores + j * BLOCK);
    }
    soften(p, w, first);
    multiply_values(p, w, head, first);
    first = false;
  }
  for (int64_t i = 0; i < count; ++i) {
    // [B, queries, H, width]: the order in which the output projection reads them.
    BF16* to = out + ((b * p.queries + query_block * BLOCK + i) * p.heads + h) * p.width;
    const float* from = w.out + i * p.width_tiles * 16;
    const float factor = first || w.sums[i] == 0.0f ? 0.0f : 1.0f / w.sums[i];
    for (int64_t d = 0; d < p.width; d += LANES) {
      const __m512 value = first ? _mm512_setzero_ps() : _mm512_load_ps(from + d);
      store(to + d, lanes(p.width - d), _mm512_mul_ps(value, _mm512_set1_ps(factor)));
    }
  }
}

}  // namespace

// Q [B, H, T, D], K [B, G, S, D], V [B, G, S, E], all bf16, G a divisor of H → [B, T, H, E].
Tensor attention(const Tensor& any_query, const Tensor& any_key, const Tensor& any_value,
                 const std::optional<Tensor>& any_mask, bool causal, double scale) {
  const Tensor query = with_rows(any_query), key = with_rows(any_key), value = with_rows(any_value);
  const std::optional<Tensor> mask = any_mask ? std::optional<Tensor>(with_rows(*any_mask)) : std::nullopt;
  const ScalarType dtype = query.scalar_type();
  Tensor out = empty({query.size(0), query.size(2), query.size(1), value.size(3)}, dtype);
  if (!out.numel()) return out;
  Problem p{query.size(0), query.size(1), key.size(1),  query.size(2),          key.size(2), query.size(3), value.size(3),
            Heads(query),  Heads(key),    Heads(value), mask ? std::optional<Mask>(*mask) : std::nullopt, causal, static_cast<float>(scale)};
  const int64_t packs = p.batches * p.groups * p.key_blocks;
  const int64_t masks = mask ? p.mask->batches * p.mask->heads * p.query_blocks : 0;
  torch::stable::parallel_for(0, packs + masks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i >= packs) {
        const int64_t matrix = (i - packs) / p.query_blocks;
        classify(p, matrix / p.mask->heads, matrix % p.mask->heads, (i - packs) % p.query_blocks);
        continue;
      }
      const int64_t head = i / p.key_blocks, block = i % p.key_blocks;
      pack_keys(p, head / p.groups, head % p.groups, block, p.k_tiles(head, block));
      pack_values(p, head / p.groups, head % p.groups, block, p.v_tiles(head, block));
    }
  });
  auto* to = static_cast<BF16*>(out.data_ptr());
  torch::stable::parallel_for(0, p.batches * p.heads * p.query_blocks, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles(true);
    Workspace w(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / p.query_blocks;
      attend(p, w, head / p.heads, head % p.heads, i % p.query_blocks, to);
    }
  });
  return out;
}
#else
Tensor attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, double) {
  throw std::runtime_error("int8pass_cpu: attention needs AMX");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(int8pass_cpu, CPU, library) { library.impl("attention", TORCH_BOX(&attention)); }

}  // namespace int8pass
