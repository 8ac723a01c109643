#pragma once
// Attention backward on Hopper, bfloat16, for heads of up to 128 channels. With p and dS recomputed from the statistics
// of the forward pass (attend_statistics.cuh):
//
//     dq = Σ_keys dS k / √d     dv = Σ_queries p dout     dk = Σ_queries dS q / √d
//
// Two kernels, each summing in registers what it writes: one walks the keys that a tile of queries sees, as the forward
// pass does, and finds the statistics of its rows first; the other the queries that see a tile of keys, which are one
// interval for each key. S and dP are computed in both, seven products instead of five; in return nothing is
// accumulated in memory, so that every run gives the same bits and there is no second, deterministic version.
//
// A key belongs to the run in which its last query finds it: keys kept for ever (sinks, anchors) form tiles along their
// own lattice and are walked to the end of the sequence, passing keys form tiles of neighbours and are left after W
// queries. Every key has one owner. Where W = 0, a passing key is seen by its own query alone: the first kernel has all
// that its gradients need and writes them, for whole tiles of rows, and the second then writes those of the kept keys.

#include "ratplus/backend/cuda/detail/attend_backward_keys_sm90.cuh"
#include "ratplus/backend/cuda/detail/attend_backward_queries_sm90.cuh"

namespace ratplus::cuda::detail {

template <class P>
void attend_backward_tiles(context& ctx, const P& pattern, const attend_backward_args<bfloat16>& p) {
  const index_t H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  const auto patterns = on_device(pattern, H);
  using heads = std::remove_const_t<decltype(patterns)>;
  const auto statistics = room_for_statistics(ctx, p);

  const backward_queries_job<heads> queries{.q = hopper::tensor_map(rows_of(p.q), tile_rows),
                                            .dout = hopper::tensor_map(rows_of(p.dout), tile_rows),
                                            .out = hopper::tensor_map(rows_of(p.out), step_rows),
                                            .dq = hopper::tensor_map(rows_of(p.dq), tile_rows / 2),
                                            .dk = hopper::tensor_map(rows_of(p.dk), step_rows),
                                            .dv = hopper::tensor_map(rows_of(p.dv), step_rows),
                                            .keys = lattices_of(pattern, p.k, p.v, step_rows),
                                            .patterns = patterns,
                                            .shape = shape_of(p),
                                            .tiles = {order_of(p.q), ctx.counters(1)},
                                            .lse = p.lse,
                                            .statistics = statistics};
  backward_keys_job<heads> keys{.q = hopper::tensor_map(rows_of(p.q), step_rows),
                                .dout = hopper::tensor_map(rows_of(p.dout), step_rows),
                                .keys = lattices_of(pattern, p.k, p.v, tile_rows),
                                .patterns = patterns,
                                .shape = shape_of(p),
                                .tiles = {order_of(p.q), ctx.counters(1)},
                                .tiles_of_run = {},
                                .statistics = statistics,
                                .dk = p.dk,
                                .dv = p.dv};
  // A run's end never falls, so its last query tells how far its lattice is used.
  const index_t groups = head_groups(pattern);
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& one) {
      const key_runs last = one.keys(T - 1);
      const int joined = joined_sinks(one);
      for (int r = joined > 0 ? 1 : 0; r < (sees_own_key_alone(one) ? window_run : key_runs::count); ++r) {
        const int indices = on_lattice(last[r]).end + (r == 1 && joined > 0 ? sink_rows : 0);
        keys.tiles_of_run[r] = std::max(keys.tiles_of_run[r], (indices + tile_rows - 1) / tile_rows);
      }
    });
  keys.tiles.order.tiles = keys.tiles_of_run[0] + keys.tiles_of_run[1] + keys.tiles_of_run[2];

  const auto with = [&](auto kernel, const auto& job, int bytes) {
    if (job.tiles.order.count() == 0) return;  // no key is seen by others than its own query
    launch(ctx, "attend backward", kernel, blocks_of(ctx, job.tiles.order), 3 * hopper::group_threads, bytes, job);
  };
  if (d <= 64) {
    with(attend_backward_queries_sm90<64, heads>, queries, backward_queries_memory<64>::bytes);
    with(attend_backward_keys_sm90<64, heads>, keys, backward_keys_memory<64>::bytes);
  } else {
    with(attend_backward_queries_sm90<128, heads>, queries, backward_queries_memory<128>::bytes);
    with(attend_backward_keys_sm90<128, heads>, keys, backward_keys_memory<128>::bytes);
  }
}

}  // namespace ratplus::cuda::detail
