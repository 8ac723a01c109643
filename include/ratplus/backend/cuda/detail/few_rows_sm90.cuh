#pragma once
// C = A · Bᵀ with at most 64 rows of A, bfloat16, on Hopper: again reading B is what takes time. A block has 64 to 128
// rows of B, or a part of their columns where there are too few rows for the card. One warp has the copy engine bring
// panels of 64 columns of B, and of A, into a ring that fills the shared memory, four multiply. Where B is a parameter
// the ring is filled with it before the kernel before this one has ended, so that the memory is busy while one kernel
// waits for the other. B passes through the second-level cache without pushing out what the kernels after this one want
// to find there: their rows, their arguments, their code.
//
// Blocks that share the columns of a tile leave their sums in memory, wait for each other, and finish a part of the
// tile each, always adding in the same order. Not better: clusters that exchange sums through shared memory, for a
// cluster begins when all of its multiprocessors are free; A for two or four blocks at once by multicast; a ring half
// as large, so that the next kernel's blocks fit beside this one's; a deeper ring of B with a shallow one of A.

#include <algorithm>

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/hopper.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"

namespace ratplus::cuda::detail::few_rows {

inline constexpr int most_streamed_rows = 64;  // of A
inline constexpr int multiplying_threads = hopper::group_threads, streaming_threads = multiplying_threads + 32;

/// As in few_rows.cuh.
struct streamed_shape {
  int M, N, K;
  bool early;  // B may be read before the kernel before this one has ended

  /// Rows of A that are brought.
  [[nodiscard]] RATPLUS_HD int box() const { return (M + 7) / 8 * 8; }
};

/// Rows of B that a block has at once; how many blocks share out their columns.
template <int Rows, int Splits>
struct streamed_layout {
  static constexpr int rows = Rows, splits = Splits;
  static constexpr int b_bytes = Rows * hopper::row_bytes, a_bytes = most_streamed_rows * hopper::row_bytes;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  // A little is left for a block of another kernel: a norm, that has to run beside this one.
  static constexpr int stages = (215 * 1024) / stage_bytes, shared_bytes = 1024 + stages * stage_bytes;
};

/// What a block's sums pass through where blocks share a tile: (tiles, splits, 64, rows), and two counters for each
/// tile that are zero between kernels.
struct streamed_parts {
  float* sums;
  unsigned* counters;
};

/// The panels of 64 columns that a block multiplies, in order: tile by tile.
template <class L>
struct panel_walk {
  int tile, k, begin, end, step, tiles;

  __device__ explicit panel_walk(const streamed_shape& s) {
    const int panels = (s.K + hopper::panel_channels - 1) / hopper::panel_channels;
    const int split = static_cast<int>(blockIdx.x) % L::splits;
    begin = panels * split / L::splits;
    end = panels * (split + 1) / L::splits;
    tiles = (s.N + L::rows - 1) / L::rows;
    tile = begin < end ? static_cast<int>(blockIdx.x) / L::splits : tiles;
    step = static_cast<int>(gridDim.x) / L::splits;
    k = begin;
  }
  __device__ explicit operator bool() const { return tile < tiles; }
  __device__ void operator++() {
    if (++k == end) k = begin, tile += step;
  }
};

/// The four warps' sums of one tile, to be finished by themselves.
template <class L>
struct tile_sums {
  float sum[L::rows / 2];

  /// f(m, column of the tile, two sums) for all that this thread holds.
  template <class F>
  __device__ void for_each_pair(F&& f) const {
    const int lane_id = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane_id / 4;
#pragma unroll
    for (int j = 0; j < L::rows / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        f(row + 8 * h, 8 * j + lane_id % 4 * 2, make_float2(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]));
  }
};

/// Finishes this block's share of a tile's columns of C with the sums of all its blocks.
template <class L, class Out>
__device__ void finish_together(const tile_sums<L>& sums, const Out& out, const streamed_shape& s,
                                const streamed_parts& parts, int tile) {
  constexpr int share = L::rows / L::splits, pairs = share / 2;
  constexpr int each = most_streamed_rows * pairs / multiplying_threads, part = most_streamed_rows * L::rows;
  const int split = static_cast<int>(blockIdx.x) % L::splits;
  float* const whole = parts.sums + static_cast<std::size_t>(tile) * L::splits * part;
  sums.for_each_pair([&](int m, int column, float2 x) {
    if (m < s.M) *reinterpret_cast<float2*>(whole + split * part + m * L::rows + column) = x;
  });
  __threadfence();
  // What the result starts from is read meanwhile.
  float2 x[each];
  const auto row = [&](int e) { return (static_cast<int>(threadIdx.x) + e * multiplying_threads) / pairs; };
  const auto column = [&](int e) {
    return split * share + (static_cast<int>(threadIdx.x) + e * multiplying_threads) % pairs * 2;
  };
#pragma unroll
  for (int e = 0; e < each; ++e) {
    const int n = tile * L::rows + column(e);
    x[e] = row(e) < s.M && n < s.N ? out.pair_before(row(e), n) : float2{};
  }
  hopper::sync_threads(1, multiplying_threads);
  if (threadIdx.x == 0) {
    unsigned *const arrived = parts.counters + 2 * tile, *const left = arrived + 1, seen;
    atomicAdd(arrived, 1u);
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    while (seen < L::splits);
    if (atomicAdd(left, 1u) + 1 == L::splits) *arrived = *left = 0;
  }
  hopper::sync_threads(1, multiplying_threads);
  float2 term[each][L::splits];
#pragma unroll
  for (int e = 0; e < each; ++e)
    if (row(e) < s.M)
#pragma unroll
      for (int i = 0; i < L::splits; ++i)
        term[e][i] = __ldcg(reinterpret_cast<const float2*>(whole + i * part + row(e) * L::rows + column(e)));
#pragma unroll
  for (int e = 0; e < each; ++e) {
    const int n = tile * L::rows + column(e);
    if (row(e) >= s.M || n >= s.N) continue;
#pragma unroll
    for (int i = 0; i < L::splits; ++i) x[e].x += term[e][i].x, x[e].y += term[e][i].y;
    out.write_pair(row(e), n, x[e]);
  }
}

/// Out: out.pair_before(m, n) is what elements (m, n) and (m, n + 1) start from, out.write_pair(m, n, x) their end.
template <class L, class Out>
__global__ void __launch_bounds__(streaming_threads, 1)
    streaming_kernel(Out out, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     streamed_shape s, streamed_parts parts) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using namespace hopper;
  char* const ring = shared_tiles();
  __shared__ hopper::barrier full[L::stages], empty[L::stages];
  constexpr int warps = multiplying_threads / 32;
  const int warp = threadIdx.x / 32, lane_id = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::stages; ++i) {
      full[i].init(1);
      empty[i].init(warps);
    }
    publish_barriers();
  }
  __syncthreads();

  if (warp == warps) {
    if (lane_id > 0) return;
    prefetch(a_map);
    const std::uint64_t policy = read_once();
    const auto load_b = [&](int stage, const panel_walk<L>& at) {
      full[stage].arrive_expecting(s.box() * row_bytes + L::b_bytes);
      load_panel(ring + stage * L::stage_bytes + L::a_bytes, b_map, full[stage], at.k * panel_channels,
                 at.tile * L::rows, 0, 0, policy);
    };
    const auto load_a = [&](int stage, const panel_walk<L>& at) {
      load_panel(ring + stage * L::stage_bytes, a_map, full[stage], at.k * panel_channels, 0, 0, 0);
    };
    if (!s.early) wait_for_previous();
    panel_walk<L> at(s), a_at = at;
    for (int i = 0; i < L::stages && at; ++i, ++at) load_b(i, at);
    if (s.early) wait_for_previous();
    for (int i = 0; i < L::stages && a_at; ++i, ++a_at) load_a(i, a_at);
    for (ring_place<L::stages> place; at; ++at, place.advance()) {
      empty[place.stage].wait(place.parity);
      load_b(place.stage, at);
      load_a(place.stage, at);
    }
    return;
  }

  wait_for_previous();
  ring_place<L::stages> place;
  const panel_walk<L> walk(s);
  for (int tile = static_cast<int>(blockIdx.x) / L::splits; tile < walk.tiles; tile += walk.step) {
    tile_sums<L> sums{};
    int used = -1;  // the stage whose products may be unfinished
    const auto release = [&] {
      if (used >= 0 && lane_id == 0) empty[used].arrive();
    };
    for (int k = walk.begin; k < walk.end; ++k) {
      full[place.stage].wait(place.parity);
      const std::uint64_t a = operand(ring + place.stage * L::stage_bytes), b = advanced(a, L::a_bytes);
      hopper::pin(sums.sum);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < panel_channels / 16; ++c) product(sums.sum, advanced(a, c * 32), advanced(b, c * 32), true);
      wgmma_commit();
      wgmma_wait<1>();
      release();
      used = place.stage;
      place.advance();
    }
    wgmma_wait<0>();
    hopper::pin(sums.sum);
    release();

    if constexpr (L::splits > 1) {
      finish_together(sums, out, s, parts, tile);
    } else {
      sums.for_each_pair([&](int m, int column, float2 x) {
        const int n = tile * L::rows + column;
        if (m >= s.M || n >= s.N) return;
        const float2 before = out.pair_before(m, n);
        out.write_pair(m, n, make_float2(before.x + x.x, before.y + x.y));
      });
    }
  }
#endif
}

/// Whether run_streaming serves the product.
template <class Out>
[[nodiscard]] bool streams(context& ctx, const view<const bfloat16, 2>& a, const Out& out,
                           const view<const bfloat16, 2>& b) {
  const index_t M = a.extent(0), N = b.extent(0), K = b.extent(1);
  return ctx.properties().major == 9 && M <= most_streamed_rows && K > 0 && K <= 1 << 20 && N <= INT32_MAX / 2 &&
         N % 2 == 0 && out.in_pairs() && hopper::addressable({a.data(), K, M, 1, 1, a.stride(0), 0, 0}) &&
         hopper::addressable({b.data(), K, N, 1, 1, b.stride(0), 0, 0}) &&
         hopper::compiled(streaming_kernel<streamed_layout<64, 1>, Out>);
}

/// Queues such a product.
template <class Out>
void run_streaming(context& ctx, const view<const bfloat16, 2>& a, const Out& out, const view<const bfloat16, 2>& b,
                   bool early) {
  const index_t M = a.extent(0), N = b.extent(0), K = b.extent(1), most = ctx.multiprocessors();
  const streamed_shape s{static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), early};
  const auto go = [&]<int Rows, int Splits>() {
    using L = streamed_layout<Rows, Splits>;
    const index_t tiles = ceil_div(N, Rows);
    streamed_parts parts{};
    if (Splits > 1) {
      const index_t sums = tiles * Splits * most_streamed_rows * Rows;
      parts.sums = static_cast<float*>(ctx.scratch(static_cast<std::size_t>(sums) * sizeof(float)));
      parts.counters = ctx.counters(static_cast<std::size_t>(2 * tiles));
    }
    launch_overlapped(ctx, "matmul", streaming_kernel<L, Out>,
                      dim3(static_cast<unsigned>(std::min(tiles * Splits, most))), dim3(streaming_threads),
                      static_cast<std::size_t>(L::shared_bytes), out,
                      hopper::tensor_map({a.data(), K, M, 1, 1, a.stride(0), 0, 0}, s.box()),
                      hopper::tensor_map({b.data(), K, N, 1, 1, b.stride(0), 0, 0}, Rows), s, parts);
  };
  // As many blocks as fit the card at once, and no more where they wait for each other.
  if (ceil_div(N, 64) * 4 <= most) return go.template operator()<64, 4>();
  if (ceil_div(N, 64) * 2 <= most) return go.template operator()<64, 2>();
  if (ceil_div(N, 64) <= most) return go.template operator()<64, 1>();
  if (ceil_div(N, 80) <= most) return go.template operator()<80, 1>();
  go.template operator()<128, 1>();
}

}  // namespace ratplus::cuda::detail::few_rows
