#pragma once
// Attention by rows: one warp for each query (forward, dq) or key (dk, dv), in float32 arithmetic, for any head size up
// to 256, data type, alignment, architecture and past. A lane takes one row of the other side at a time for the
// products of whole rows, and every 32nd channel of the sums. The tiled kernels are faster wherever they apply; this is
// the fallback and their oracle on the device.

#include "ratplus/backend/cuda/detail/attend_statistics.cuh"
#include "ratplus/backend/cuda/detail/heads.cuh"
#include "ratplus/core/softmax_state.hpp"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::cuda::detail {

inline constexpr int channels_per_lane = most_channels / 32;

__device__ inline float warp_max(float x) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
/// A warp's own row, as floats in shared memory.
template <class T>
__device__ void keep_row(float* kept, const T* row, int d, int lane) {
  for (int i = lane; i < d; i += 32) kept[i] = to_float(row[i]);
  __syncwarp();
}

template <class T>
__device__ float dot(const float* kept, const T* row, int d) {
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < d; ++i) sum += kept[i] * to_float(row[i]);
  return sum;
}

/// sums (channels lane, lane + 32, …) += Σ_j weight of lane j · row j, over n ≤ 32 rows.
template <class T>
__device__ void add_rows(float (&sums)[channels_per_lane], float weight, const T* rows, index_t stride, int n, int d,
                         int lane) {
  for (int j = 0; j < n; ++j, rows += stride) {
    const float w = __shfl_sync(~0u, weight, j);
#pragma unroll
    for (int c = 0; c < channels_per_lane; ++c)
      if (lane + 32 * c < d) sums[c] += w * to_float(rows[lane + 32 * c]);
  }
}

template <class T>
__device__ void put_row(T* row, const float (&sums)[channels_per_lane], float scale, int d, int lane) {
#pragma unroll
  for (int c = 0; c < channels_per_lane; ++c)
    if (lane + 32 * c < d) row[lane + 32 * c] = from_float<T>(sums[c] * scale);
}

/// The row a warp works for: row t of head h of sequence b, consecutive warps taking consecutive rows.
struct row_place {
  int b, h, t;
  __device__ row_place(index_t i, index_t H, index_t T)
      : b(static_cast<int>(i / (H * T))), h(static_cast<int>(i / T % H)), t(static_cast<int>(i % T)) {}
};
[[nodiscard]] __device__ inline index_t this_row() {
  return static_cast<index_t>(blockIdx.x) * warps_per_block + threadIdx.x / 32;
}

template <class Heads, class T, class KV>
__global__ void __launch_bounds__(32 * warps_per_block)
    attend_forward_rows(const Heads heads, const attend_forward_args<T, KV> p, const float scale) {
  __shared__ float queries[warps_per_block][most_channels];
  const index_t H = p.q.extent(1), rows = p.q.extent(2);
  const int d = static_cast<int>(p.q.extent(3)), lane = static_cast<int>(threadIdx.x) % 32;
  if (this_row() >= p.q.extent(0) * H * rows) return;
  const auto [b, h, t] = row_place(this_row(), H, rows);
  float sums[channels_per_lane] = {};
  if (t >= (p.spans.length ? p.spans.length[b] : rows)) {
    put_row(p.out.row(b, h, t), sums, 1.0f, d, lane);
    if (p.lse && lane == 0) p.lse(b, h, t) = 0;
    return;
  }
  float* const q = queries[threadIdx.x / 32];
  keep_row(q, p.q.row(b, h, t), d, lane);

  softmax_state<float> state;
  // n keys and values whose rows are `stride` elements apart.
  const auto visit = [&](const auto* k, const auto* v, index_t k_stride, index_t v_stride, index_t n) {
    for (index_t i = 0; i < n; i += 32) {
      const int here = static_cast<int>(n - i < 32 ? n - i : 32);
      const float score = lane < here ? dot(q, k + (i + lane) * k_stride, d) * scale : -INFINITY;
      const float max = warp_max(score), weight = expf(score - max);
      const auto merged = combine(state, softmax_state<float>{max, warp_sum(weight)});
      state = merged.state;
#pragma unroll
      for (float& x : sums) x *= merged.scale_a;
      add_rows(sums, weight * merged.scale_b, v + i * v_stride, v_stride, here, d, lane);
    }
  };
  const index_t first = p.past ? p.spans.first[b] : 0, position = first + t;
  heads.visit(h, [&](const auto& pattern) {
    const key_runs keys = pattern.keys(position);
    for (const key_run& run : keys.run) {
      if (p.past) {
        const head_slots& head = p.past.heads[h];
        for (const slot_run& part : head.where.find(clip(run, 0, first)).part)
          if (part.count > 0)
            visit(p.past.k.row(b, head.offset + part.slot), p.past.v.row(b, head.offset + part.slot),
                  part.step * p.past.k.stride(1), part.step * p.past.v.stride(1), part.count);
      }
      if (const key_run fresh = clip(run, first, position + 1); !fresh.empty())
        visit(p.k.row(b, h, fresh.begin - first), p.v.row(b, h, fresh.begin - first), fresh.step * p.k.stride(2),
              fresh.step * p.v.stride(2), fresh.count());
    }
  });
  put_row(p.out.row(b, h, t), sums, 1.0f / state.sum, d, lane);
  if (p.lse && lane == 0) p.lse(b, h, t) = state.log_sum_exp();
}

/// dq.
template <class Heads, class T>
__global__ void __launch_bounds__(32 * warps_per_block)
    attend_backward_queries(const Heads heads, const attend_backward_args<T> p,
                            const view<const row_statistics, 3> statistics, const float scale) {
  __shared__ float queries[warps_per_block][most_channels], gradients[warps_per_block][most_channels];
  const index_t H = p.q.extent(1), rows = p.q.extent(2);
  const int d = static_cast<int>(p.q.extent(3)), lane = static_cast<int>(threadIdx.x) % 32;
  if (this_row() >= p.q.extent(0) * H * rows) return;
  const auto [b, h, t] = row_place(this_row(), H, rows);
  float sums[channels_per_lane] = {};
  if (t >= (p.spans.length ? p.spans.length[b] : rows)) return put_row(p.dq.row(b, h, t), sums, 1.0f, d, lane);
  float *const q = queries[threadIdx.x / 32], *const dout = gradients[threadIdx.x / 32];
  keep_row(q, p.q.row(b, h, t), d, lane);
  keep_row(dout, p.dout.row(b, h, t), d, lane);

  const auto [lse2, delta] = statistics(b, h, t);
  heads.visit(h, [&](const auto& pattern) {
    const key_runs keys = pattern.keys(t);
    for (const key_run& run : keys.run) {
      const index_t k_stride = run.step * p.k.stride(2), v_stride = run.step * p.v.stride(2), n = run.count();
      for (index_t i = 0; i < n; i += 32) {
        const int here = static_cast<int>(n - i < 32 ? n - i : 32);
        const T* const k = p.k.row(b, h, run.begin) + i * k_stride;
        const T* const v = p.v.row(b, h, run.begin) + i * v_stride;
        float dscore = 0;
        if (lane < here)
          dscore = exp2f(dot(q, k + lane * k_stride, d) * scale * log2_e - lse2) *
                   (dot(dout, v + lane * v_stride, d) - delta);
        add_rows(sums, dscore, k, k_stride, here, d, lane);
      }
    }
  });
  put_row(p.dq.row(b, h, t), sums, scale, d, lane);
}

/// dk and dv: the queries that see key t are t … last_query(t).
template <class Heads, class T>
__global__ void __launch_bounds__(32 * warps_per_block)
    attend_backward_keys(const Heads heads, const attend_backward_args<T> p,
                         const view<const row_statistics, 3> statistics, const float scale) {
  __shared__ float keys[warps_per_block][most_channels], values[warps_per_block][most_channels];
  const index_t H = p.q.extent(1), rows = p.q.extent(2);
  const int d = static_cast<int>(p.q.extent(3)), lane = static_cast<int>(threadIdx.x) % 32;
  if (this_row() >= p.q.extent(0) * H * rows) return;
  const auto [b, h, t] = row_place(this_row(), H, rows);
  const index_t used = p.spans.length ? p.spans.length[b] : rows;
  float dk[channels_per_lane] = {}, dv[channels_per_lane] = {};
  if (t < used) {
    float *const k = keys[threadIdx.x / 32], *const v = values[threadIdx.x / 32];
    keep_row(k, p.k.row(b, h, t), d, lane);
    keep_row(v, p.v.row(b, h, t), d, lane);
    index_t last = 0;
    heads.visit(h, [&](const auto& pattern) { last = pattern.last_query(t, used); });
    for (index_t i = t; i <= last; i += 32) {
      const int here = static_cast<int>(last + 1 - i < 32 ? last + 1 - i : 32);
      float weight = 0, dscore = 0;
      if (lane < here) {
        const auto [lse2, delta] = statistics(b, h, i + lane);
        weight = exp2f(dot(k, p.q.row(b, h, i + lane), d) * scale * log2_e - lse2);
        dscore = weight * (dot(v, p.dout.row(b, h, i + lane), d) - delta);
      }
      add_rows(dv, weight, p.dout.row(b, h, i), p.dout.stride(2), here, d, lane);
      add_rows(dk, dscore, p.q.row(b, h, i), p.q.stride(2), here, d, lane);
    }
  }
  put_row(p.dk.row(b, h, t), dk, scale, d, lane);
  put_row(p.dv.row(b, h, t), dv, 1.0f, d, lane);
}

inline unsigned row_blocks(const extents<4>& shape) {
  return static_cast<unsigned>(ceil_div(shape[0] * shape[1] * shape[2], warps_per_block));
}

}  // namespace ratplus::cuda::detail
