#pragma once
// Attention of a few rows over a cache: every key and value is read once and used once, so the only aim is to keep the
// memory busy. A block takes one row of one head and a share of its keys, a warp 32 lanes · 16 bytes of keys and of
// values at a time, the next while the last are used. Where rows and heads are too few for the card the
// keys are split over several blocks, and the last one to finish combines the partial softmaxes, always in the same
// order.
//
// Positions are read on the device: the same launch serves every step, so a captured graph can be replayed. A row whose
// keys are far apart (anchors of a denser cache) and the wrap of the window's ring are segments with a stride; nothing
// is gathered. Any number of rows is correct, but rows of a sequence share no reads: beyond a few, use a tiled kernel.

#include <algorithm>

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/heads.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"
#include "ratplus/ops/attend.hpp"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::cuda::detail {

/// Calls of up to this many rows after a past are decoded.
inline constexpr index_t decoded_rows = 16;

inline constexpr int decode_warps = 4;
inline constexpr int decode_threads = 32 * decode_warps;

/// A barrier among the threads that decode; a block may have others.
__device__ inline void sync_decoding() { asm volatile("bar.sync 1, %0;" ::"n"(decode_threads) : "memory"); }

/// How a warp holds rows of up to D channels: V consecutive channels a lane and access, `accesses` of them, `lanes`
/// lanes a key, so that one access of the warp covers `keys` keys, and `batch` of them are read at once.
template <int D, int V>
struct decode_layout {
  static constexpr int vector = V;
  static constexpr int lanes = D / V < 32 ? D / V : 32;
  static constexpr int keys = 32 / lanes;
  static constexpr int accesses = D / V / lanes;
  static constexpr int channels = V * accesses;  // of one lane
  static constexpr int batch = accesses < 4 ? 4 / accesses : 1;
  static constexpr int size = D;
};

/// Consecutive keys at a stride, `count` of them from key and value on.
template <class S>
struct key_segment {
  const S *k, *v;
  index_t k_stride, v_stride, count;
};

/// The keys of one row: at most two parts of the past for each run, and one of this call's rows.
template <class T, class KV>
struct row_segments {
  key_segment<KV> past[2 * key_runs::count];
  key_segment<T> fresh[key_runs::count];
};

/// The segments of run r.
template <class Heads, class T, class KV>
__device__ void find_segments(const Heads& heads, const attend_forward_args<T, KV>& p, index_t b, index_t h, index_t t,
                              int r, row_segments<T, KV>& found) {
  const index_t first = p.past ? p.spans.first[b] : 0, position = first + t;
  key_runs runs;
  heads.visit(h, [&](const auto& pattern) { runs = pattern.keys(position); });
  const key_run fresh = clip(runs[r], first, position + 1);
  found.fresh[r] = {p.k.row(b, h, fresh.begin - first), p.v.row(b, h, fresh.begin - first), fresh.step * p.k.stride(2),
                    fresh.step * p.v.stride(2), fresh.count()};
  slot_runs slots{};
  head_slots head{};
  if (p.past) {
    head = p.past.heads[h];
    slots = head.where.find(clip(runs[r], 0, first));
  }
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const slot_run& run = slots.part[part];
    key_segment<KV>& segment = found.past[2 * r + part];
    segment.count = run.count;
    if (run.count == 0) continue;
    segment.k = p.past.k.row(b, head.offset + run.slot);
    segment.v = p.past.v.row(b, head.offset + run.slot);
    segment.k_stride = run.step * p.past.k.stride(1);
    segment.v_stride = run.step * p.past.v.stride(1);
  }
}

/// A lane's share of a partial softmax, in base 2: scores are multiplied by log₂ e beforehand.
template <int Channels>
struct partial_softmax {
  // Low enough for any score to replace it, finite so that differences are never NaN.
  float max = -1e30f, sum = 0;
  float out[Channels] = {};

  __device__ void join(float other_max, float other_sum, const float (&other_out)[Channels]) {
    const float top = fmaxf(max, other_max), mine = fast_exp2(max - top), theirs = fast_exp2(other_max - top);
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < Channels; ++i) out[i] = out[i] * mine + other_out[i] * theirs;
    max = top;
  }
};

/// As many keys of a segment as a warp takes at once, and their values, on their way.
template <class L, class S>
struct key_chunk {
  raw_channels<S, L::vector> k[L::batch][L::accesses], v[L::batch][L::accesses];
  unsigned there;  // bit u: whether the lane's u-th key exists

  /// Keys `from` … of the segment. Once: they lie in global memory and nobody else wants them.
  template <bool Once = false>
  __device__ void read(const key_segment<S>& segment, index_t from, index_t d) {
    const int lane_id = threadIdx.x % 32, channel = lane_id % L::lanes * L::vector;
    there = 0;
#pragma unroll
    for (int u = 0; u < L::batch; ++u) {
      const index_t i = from + u * L::keys + lane_id / L::lanes;
      const bool exists = i < segment.count;
      if (exists) there |= 1u << u;
      const S *key = segment.k + i * segment.k_stride, *value = segment.v + i * segment.v_stride;
#pragma unroll
      for (int a = 0; a < L::accesses; ++a) {
        const int c = a * L::lanes * L::vector + channel;
        if (exists && c < d) {
          if constexpr (Once) {
            k[u][a].read_once(key + c);
            v[u][a].read_once(value + c);
          } else {
            k[u][a].read(key + c);
            v[u][a].read(value + c);
          }
        } else {
#pragma unroll
          for (unsigned& word : k[u][a].word) word = 0;
#pragma unroll
          for (unsigned& word : v[u][a].word) word = 0;
        }
      }
    }
  }

  __device__ void add_to(partial_softmax<L::channels>& state, const float (&q)[L::channels]) const {
    float score[L::batch], top = state.max;
#pragma unroll
    for (int u = 0; u < L::batch; ++u) {
      float dot = 0;
#pragma unroll
      for (int a = 0; a < L::accesses; ++a)
#pragma unroll
        for (int i = 0; i < L::vector; ++i) dot += q[a * L::vector + i] * k[u][a][i];
#pragma unroll
      for (int offset = L::lanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
      score[u] = there >> u & 1 ? dot : -1e30f;
      top = fmaxf(top, score[u]);
    }
    const float scale = fast_exp2(state.max - top);
    state.max = top;
    state.sum *= scale;
#pragma unroll
    for (float& o : state.out) o *= scale;
#pragma unroll
    for (int u = 0; u < L::batch; ++u) {
      const float weight = there >> u & 1 ? fast_exp2(score[u] - top) : 0.0f;
      state.sum += weight;
#pragma unroll
      for (int a = 0; a < L::accesses; ++a)
#pragma unroll
        for (int i = 0; i < L::vector; ++i) state.out[a * L::vector + i] += weight * v[u][a][i];
    }
  }
};

/// A warp's walk over its chunks of some segments, which are dealt out in turn to all warps. Once: as in key_chunk.
template <class L, class S, bool Once = false>
class chunk_walk {
 public:
  /// `next`: the number of the warp's first chunk, from the first segment's beginning.
  __device__ chunk_walk(const key_segment<S>* segments, int count, index_t& next, index_t workers)
      : segment_(segments), end_(segments + count), next_(next), workers_(workers) {
    find();
  }
  __device__ explicit operator bool() const { return segment_ != end_; }
  __device__ void read(key_chunk<L, S>& to, index_t d) const { to.template read<Once>(*segment_, next_ * chunk, d); }
  __device__ void operator++() {
    next_ += workers_;
    find();
  }

 private:
  static constexpr index_t chunk = L::keys * L::batch;

  __device__ void find() {
    for (; segment_ != end_; ++segment_) {
      const index_t chunks = ceil_div(segment_->count, chunk);
      if (next_ < chunks) return;
      next_ -= chunks;
    }
  }

  const key_segment<S>*segment_, *end_;
  index_t& next_;
  index_t workers_;
};

/// Partial results of `splits` blocks a row: (rows, splits, D + 2), the sum and the maximum behind the D channels.
struct decode_partials {
  static constexpr int most_splits = 256;
  float* partial;
  unsigned* arrived;  // one for each row, zero
  int splits;
};

/// A block's partial softmaxes in shared memory, one of each warp.
template <class L>
struct block_partials {
  float sum[decode_warps], max[decode_warps], out[decode_warps][L::size];
};

/// Joins what a warp's lanes have of other keys and the same channels, and leaves it to the block.
template <class L>
__device__ void leave_partial(partial_softmax<L::channels>& state, block_partials<L>& block) {
  const int warp = threadIdx.x / 32, lane_id = threadIdx.x % 32, channel = lane_id % L::lanes * L::vector;
#pragma unroll
  for (int offset = L::lanes; offset < 32; offset *= 2) {
    float other[L::channels];
#pragma unroll
    for (int i = 0; i < L::channels; ++i) other[i] = __shfl_xor_sync(~0u, state.out[i], offset);
    const float other_max = __shfl_xor_sync(~0u, state.max, offset);
    const float other_sum = __shfl_xor_sync(~0u, state.sum, offset);
    state.join(other_max, other_sum, other);
  }
  if (lane_id < L::lanes) {
#pragma unroll
    for (int a = 0; a < L::accesses; ++a)
#pragma unroll
      for (int i = 0; i < L::vector; ++i)
        block.out[warp][a * L::lanes * L::vector + channel + i] = state.out[a * L::vector + i];
    if (lane_id == 0) {
      block.sum[warp] = state.sum;
      block.max[warp] = state.max;
    }
  }
}

/// Joins a block's partial softmaxes of row t of head h, sequence b, split `split`, and finishes the row: see
/// decode_row.
template <class L, class T, class KV, class F>
__device__ bool finish_row(const block_partials<L>& block, const attend_forward_args<T, KV>& p, index_t b, index_t h,
                           index_t t, int split, const decode_partials& parts, F&& f) {
  constexpr int D = L::size;
  const index_t H = p.q.extent(1), rows = p.q.extent(2), d = p.q.extent(3);
  const int warp = threadIdx.x / 32, lane_id = threadIdx.x % 32;
  const auto finish = [&](index_t c, float max, float sum, float out) {
    if (c < d) f(c, out / sum);
    if (p.lse && c == 0) p.lse(b, h, t) = (max + log2f(sum)) / log2_of_e;
  };
  const index_t row = (b * H + h) * rows + t;
  float* partial = parts.partial + row * parts.splits * (D + 2);
  for (int c = threadIdx.x; c < D; c += decode_threads) {
    partial_softmax<1> joined;
    for (int w = 0; w < decode_warps; ++w) joined.join(block.max[w], block.sum[w], {block.out[w][c]});
    if (parts.splits == 1) {
      finish(c, joined.max, joined.sum, joined.out[0]);
    } else {
      float* mine = partial + split * (D + 2);
      mine[c] = joined.out[0];
      if (c == 0) {
        mine[D] = joined.sum;
        mine[D + 1] = joined.max;
      }
    }
  }
  if (parts.splits == 1) return true;
  __shared__ bool last;
  __threadfence();
  sync_decoding();
  if (threadIdx.x == 0) last = atomicAdd(parts.arrived + row, 1u) + 1 == static_cast<unsigned>(parts.splits);
  sync_decoding();
  if (!last) return false;
  __threadfence();
  __shared__ float factors[decode_partials::most_splits], top, total;
  if (warp == 0) {
    constexpr int each = decode_partials::most_splits / 32;
    float max[each], sum[each], greatest = -1e30f, all = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int other = i * 32 + lane_id;
      max[i] = other < parts.splits ? __ldcg(partial + other * (D + 2) + D + 1) : -1e30f;
      sum[i] = other < parts.splits ? __ldcg(partial + other * (D + 2) + D) : 0.0f;
      greatest = fmaxf(greatest, max[i]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const float factor = fast_exp2(max[i] - greatest);
      factors[i * 32 + lane_id] = factor;
      all += factor * sum[i];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) all += __shfl_xor_sync(~0u, all, offset);
    if (lane_id == 0) {
      top = greatest;
      total = all;
      parts.arrived[row] = 0;
    }
  }
  sync_decoding();
  for (int c = threadIdx.x; c < D; c += decode_threads) {
    float out = 0;
#pragma unroll 8
    for (int i = 0; i < parts.splits; ++i) out += factors[i] * __ldcg(partial + i * (D + 2) + c);
    finish(c, top, total, out);
  }
  return true;
}

/// A lane's channels of the query of row t, for scores in base 2.
template <class L, class T, class KV>
__device__ void scaled_query(const attend_forward_args<T, KV>& p, index_t b, index_t h, index_t t,
                             float (&q)[L::channels]) {
  const index_t d = p.q.extent(3);
  const float scale = log2_of_e * rsqrtf(static_cast<float>(d));
#pragma unroll
  for (int a = 0; a < L::accesses; ++a)
#pragma unroll
    for (int i = 0; i < L::vector; ++i) {
      const index_t c = (a * L::lanes + threadIdx.x % 32 % L::lanes) * L::vector + i;
      q[a * L::vector + i] = c < d ? scale * to_float(p.q(b, h, t, c)) : 0.0f;
    }
}

/// This block's share of row t of head h, sequence b: split blockIdx.x. prepare() is called when the first keys are on
/// their way, before q, k and v of the row are read. f(c, x) is called with every channel of the result by the block
/// that finishes the row, one thread for each channel; true in that block.
template <class L, class Heads, class T, class KV, class Prepare, class F>
__device__ bool decode_row(const Heads& heads, const attend_forward_args<T, KV>& p, index_t b, index_t h, index_t t,
                           const decode_partials& parts, Prepare&& prepare, F&& f) {
  const index_t d = p.q.extent(3);
  const int warp = threadIdx.x / 32;
  __shared__ row_segments<T, KV> segments;
  if (threadIdx.x < key_runs::count) find_segments(heads, p, b, h, t, static_cast<int>(threadIdx.x), segments);
  __syncthreads();
  const index_t workers = static_cast<index_t>(parts.splits) * decode_warps;
  index_t next = static_cast<index_t>(blockIdx.x) * decode_warps + warp;
  key_chunk<L, KV> now, later;
  chunk_walk<L, KV, true> past(segments.past, 2 * key_runs::count, next, workers);
  if (past) past.read(now, d);
  prepare();

  float q[L::channels];
  scaled_query<L>(p, b, h, t, q);

  partial_softmax<L::channels> state;
  while (past) {
    ++past;
    if (past) past.read(later, d);
    now.add_to(state, q);
    now = later;
  }
  for (chunk_walk<L, T> fresh(segments.fresh, key_runs::count, next, workers); fresh; ++fresh) {
    key_chunk<L, T> chunk;
    fresh.read(chunk, d);
    chunk.add_to(state, q);
  }

  __shared__ block_partials<L> block;
  leave_partial<L>(state, block);
  sync_decoding();
  return finish_row(block, p, b, h, t, static_cast<int>(blockIdx.x), parts, f);
}

template <class L, class Heads, class T, class KV>
__global__ void __launch_bounds__(decode_threads)
    decode_kernel(Heads heads, attend_forward_args<T, KV> p, decode_partials parts) {
  wait_for_previous();
  const index_t rows = p.q.extent(2), d = p.q.extent(3), t = blockIdx.y % rows, h = blockIdx.y / rows, b = blockIdx.z;
  T* out = p.out.row(b, h, t);
  if (p.spans.length && t >= p.spans.length[b]) {  // padding; every block of this row comes here
    if (blockIdx.x == 0) {
      for (index_t c = threadIdx.x; c < d; c += decode_threads) out[c] = from_float<T>(0.0f);
      if (p.lse && threadIdx.x == 0) p.lse(b, h, t) = 0;
    }
    return;
  }
  decode_row<L>(
      heads, p, b, h, t, parts, [] {}, [&](index_t c, float x) { out[c] = from_float<T>(x); });
}

template <class L>
[[nodiscard]] decode_partials make_partials(context& ctx, index_t rows, index_t splits) {
  const index_t partials = rows * splits * (L::size + 2);
  return {static_cast<float*>(ctx.scratch(static_cast<std::size_t>(partials) * sizeof(float))),
          ctx.counters(static_cast<std::size_t>(rows)), static_cast<int>(splits)};
}

/// Blocks for `rows` rows of each of H heads of B sequences, and what they share their results in. `slots`: the most
/// keys that one head has in the pool.
template <class L>
struct decode_grid {
  dim3 blocks;
  decode_partials parts;

  decode_grid(context& ctx, index_t B, index_t H, index_t rows, index_t slots) {
    const index_t all = B * H * rows;
    if (H * rows > 65535 || B > 65535)
      throw shape_error(message("attend: decoding takes at most 65535 heads times rows and sequences, got ", H, " × ",
                                rows, " and ", B));
    // One wave of blocks that have a chunk for each of their warps; several, for balance, where they have many.
    const index_t chunk = index_t{L::keys} * L::batch * decode_warps, keys = slots + rows;
    const auto split = [&](index_t waves, index_t chunks) {
      return std::min(waves * 4 * ctx.multiprocessors() / all, ceil_div(keys, chunks * chunk));
    };
    const index_t splits = std::clamp<index_t>(std::max(split(1, 1), split(4, 16)), 1, decode_partials::most_splits);
    parts = splits > 1 ? make_partials<L>(ctx, all, splits) : decode_partials{nullptr, nullptr, 1};
    blocks = dim3(static_cast<unsigned>(splits), static_cast<unsigned>(H * rows), static_cast<unsigned>(B));
  }
};

/// f(layout) with the layout for heads of d channels; `wide`: whether their rows may be read 16 bytes at a time.
template <class KV, class F>
void with_decode_layout(index_t d, bool wide, F&& f) {
  check_head_size("attend", d);
  constexpr int V = widest<KV>;
  if (!wide) return f(decode_layout<256, 1>{});
  if (d <= 64) return f(decode_layout<64, V>{});
  if (d <= 128) return f(decode_layout<128, V>{});
  return f(decode_layout<256, V>{});
}

/// The most slots that one head has in a pool of `slots`.
template <class P>
[[nodiscard]] index_t slots_of_a_head(const P& pattern, index_t slots, index_t H) {
  return slots / (head_groups(pattern) == 1 ? H : 1);
}

/// attend_forward for calls of few rows (a decoding step and the like), with a past or without. Head sizes up to 256.
template <class P, class T, class KV>
void attend_decode(context& ctx, const P& pattern, const attend_forward_args<T, KV>& p) {
  const index_t B = p.q.extent(0), H = p.q.extent(1), rows = p.q.extent(2), d = p.q.extent(3);
  constexpr int V = widest<KV>;
  const bool wide = d % V == 0 && aligned(p.k, V) && aligned(p.v, V) && aligned(p.past.k, V) && aligned(p.past.v, V);
  const auto heads = grouped_on_device(pattern, H);
  with_decode_layout<KV>(d, wide, [&](auto layout) {
    using L = decltype(layout);
    const decode_grid<L> grid(ctx, B, H, rows, slots_of_a_head(pattern, p.past.k.extent(1), H));
    launch_overlapped(ctx, "attend: decode", decode_kernel<L, decltype(heads), T, KV>, grid.blocks,
                      dim3(decode_threads), 0, heads, p, grid.parts);
  });
}

}  // namespace ratplus::cuda::detail
