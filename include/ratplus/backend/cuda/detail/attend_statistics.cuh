#pragma once
// What the backward kernels read of the forward pass, once per row: log2(e) · lse and delta = Σ dout ⊙ out. Then
//
//     p = 2^{log2(e) s − lse2}     dS = p ⊙ (dout · v − delta)
//
// Rows are padded to whole tiles; rows that are not in use have lse2 = +∞, so that their p and dS vanish by themselves.

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"
#include "ratplus/ops/attend.hpp"

namespace ratplus::cuda::detail {

/// log2(e): exponentials are taken in base 2.
inline constexpr float log2_e = 1.4426950408889634f;

struct row_statistics {
  float lse2, delta;
};

inline constexpr int warps_per_block = 8;

__device__ inline float warp_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

/// One warp a row, V elements a lane at a time.
template <int V, class T>
__global__ void __launch_bounds__(32 * warps_per_block)
    attend_statistics(const attend_backward_args<T> p, const view<row_statistics, 3> statistics) {
  const index_t H = p.q.extent(1), d = p.q.extent(3), padded = statistics.extent(2);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const index_t row = static_cast<index_t>(blockIdx.x) * warps_per_block + threadIdx.x / 32;
  if (row >= p.q.extent(0) * H * padded) return;
  const index_t b = row / (H * padded), h = row / padded % H, t = row % padded;
  const bool in_use = t < (p.spans.length ? p.spans.length[b] : p.q.extent(2));
  float delta = 0;
  if (in_use)
    for (index_t i = lane * V; i < d; i += 32 * V) {
      float x[V], dx[V];
      load(p.out.row(b, h, t) + i, x);
      load(p.dout.row(b, h, t) + i, dx);
#pragma unroll
      for (int j = 0; j < V; ++j) delta += x[j] * dx[j];
    }
  delta = warp_sum(delta);
  if (lane == 0)
    statistics(b, h, t) = in_use ? row_statistics{p.lse(b, h, t) * log2_e, delta} : row_statistics{INFINITY, 0};
}

/// Room in the context's scratch memory for the statistics of all rows, (B, H, rows padded to a multiple of 64).
template <class T>
[[nodiscard]] view<row_statistics, 3> room_for_statistics(context& ctx, const attend_backward_args<T>& p) {
  const index_t B = p.q.extent(0), H = p.q.extent(1), padded = (p.q.extent(2) + 63) / 64 * 64;
  const auto bytes = static_cast<std::size_t>(B * H * padded) * sizeof(row_statistics);
  return as_view(static_cast<row_statistics*>(ctx.scratch(bytes)), B, H, padded);
}

/// The statistics of all rows.
template <class T>
[[nodiscard]] view<const row_statistics, 3> statistics_of(context& ctx, const attend_backward_args<T>& p) {
  const view<row_statistics, 3> statistics = room_for_statistics(ctx, p);
  const index_t n = statistics.size();
  const bool fours = p.q.extent(3) % 4 == 0 && aligned(p.out, 4) && aligned(p.dout, 4);
  launch(ctx, "attend backward", fours ? attend_statistics<4, T> : attend_statistics<1, T>,
         static_cast<unsigned>(ceil_div(n, warps_per_block)), 32 * warps_per_block, 0, p, statistics);
  return statistics;
}

}  // namespace ratplus::cuda::detail
