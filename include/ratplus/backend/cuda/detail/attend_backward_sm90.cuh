#pragma once
// Attention backward on Hopper, bfloat16, for heads of up to 128 channels. With p and dS recomputed from the statistics
// of the forward pass (attend_statistics.cuh):
//
//     dq = Σ_keys dS k / √d     dv = Σ_queries p dout     dk = Σ_queries dS q / √d
//
// Two kinds of tiles, each summing in registers what it writes: a tile of queries walks the keys that it sees, as the
// forward pass does, and finds the statistics of its rows first; a tile of keys the queries that see it, which are one
// interval for each key. S and dP are computed in both, seven products instead of five; in return nothing is
// accumulated in memory, so that every run gives the same bits and there is no second, deterministic version.
//
// A key belongs to the run in which its last query finds it: keys kept for ever (sinks, anchors) form tiles along their
// own lattice and are walked to the end of the sequence, passing keys form tiles of neighbours and are left after W
// queries. Every key has one owner. Where W = 0, a passing key is seen by its own query alone: the tile of queries has
// all that its gradients need and writes them, for whole tiles of rows, and then tiles of keys write those of the kept
// keys.
//
// One launch for both: blocks at tiles of queries, which mostly wait for memory, run beside blocks at tiles of keys,
// which mostly multiply, and neither kind waits for the last tile of the other. A tile of keys needs what tiles of
// queries of its head have left. Those come before it in the order in which tiles are claimed, so somebody is at work
// on them: its loading thread waits until a counter of each says that it is finished.

#include "ratplus/backend/cuda/detail/attend_backward_keys_sm90.cuh"
#include "ratplus/backend/cuda/detail/attend_backward_queries_sm90.cuh"

namespace ratplus::cuda::detail {

template <int D, class Heads>
__global__ __launch_bounds__(3 * hopper::group_threads,
                             1) void attend_backward_sm90(const __grid_constant__ backward_job<Heads> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using block_of = backward_block<D>;
  __shared__ typename block_of::shared shared;
  const block_of block{shared, shared_tiles()};
  if (threadIdx.x == 0) block.init();
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x / group_threads) - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x % group_threads);
  ring_place<2> at;

  if (group < 0) {
    give_registers<40>();
    const int warp = thread / 32;
    if (warp == 1 || warp == 2) {  // describe tiles
      constexpr int describing = block_of::describing;
      ring_place<1> claim;
      int i = static_cast<int>(blockIdx.x);
      for (bool more = true; more; at.advance()) {
        shared.tile_empty[at.stage].wait(at.parity ^ 1);
        query_or_key_tile& tile = block.tile(at.stage);
        more = i < job.tiles.order.count();
        if (more) {
          const auto [number, head] = job.tiles.order[i];
          const bool of_keys = number >= job.tiles.order.query_tiles;
          const int b = head / job.shape.H;
          const tile_place place{b, head % job.shape.H, number, job.shape.rows_in_use(b), 0};
          for (int row = thread - 32; row < tile_rows; row += describing)
            if (of_keys)
              describe_keys(job, tile.keys, place, row);
            else
              describe_queries(job, tile.queries, place, row);
          if (thread == 32) tile.kind = of_keys ? query_or_key_tile::of_keys : query_or_key_tile::of_queries;
        } else if (thread == 32) {
          tile.kind = query_or_key_tile::none;
        }
        shared.described[at.stage].arrive();
        if (!more) break;
        shared.claimable.wait(claim.parity);
        claim.advance();
        if (thread == 32) shared.claimed = job.tiles.next();
        sync_threads(6, describing);
        i = shared.claimed;
      }
    } else if (elected()) {  // a thread loads, another stores
      slot_pool<D> pool;
      typename block_of::result_place results;
      for (;; at.advance()) {
        shared.described[at.stage].wait(at.parity);
        const query_or_key_tile& tile = block.tile(at.stage);
        if (tile.kind == query_or_key_tile::none) break;
        const bool of_queries = tile.kind == query_or_key_tile::of_queries;
        barrier& empty = shared.tile_empty[at.stage];
        if (warp > 0 && of_queries) {
          store_queries<D>(job, block, tile.queries, empty, results);
          continue;
        }
        if (warp == 0 && of_queries) load_queries<D>(job, block, tile.queries, pool);
        if (warp == 0 && !of_queries) load_keys_and_queries<D>(job, block, tile.keys, pool);
        empty.arrive();
      }
    }
  } else {
    take_registers<232>();
    typename block_of::item_place items;
    typename block_of::result_place results;
    for (;; at.advance()) {
      shared.described[at.stage].wait(at.parity);
      const query_or_key_tile& tile = block.tile(at.stage);
      if (tile.kind == query_or_key_tile::none) break;
      if (tile.kind == query_or_key_tile::of_keys)
        compute_keys<D>(job, block, tile.keys, items, group, thread);
      else
        compute_queries<D>(job, block, tile.queries, items, results, group, thread);
      if (thread % 32 == 0) shared.tile_empty[at.stage].arrive();
    }
  }
#endif
}

template <class P>
void attend_backward_tiles(context& ctx, const P& pattern, const attend_backward_args<bfloat16>& p) {
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  const auto patterns = on_device(pattern, H);
  using heads = std::remove_const_t<decltype(patterns)>;
  const index_t query_tiles = ceil_div(T, tile_rows), padded = ceil_div(T, step_rows) * step_rows;
  row_statistics* statistics = nullptr;
  unsigned* finished = nullptr;
  const auto carve = [&](carver memory) {
    statistics = memory.take<row_statistics>(B * H * padded);
    finished = memory.take<unsigned>(B * H * query_tiles);
    return memory.bytes();
  };
  carve(carver(ctx.scratch(carve(carver()))));
  check(cudaMemsetAsync(finished, 0, static_cast<std::size_t>(B * H * query_tiles) * sizeof(unsigned), ctx.stream()),
        "attend backward");

  backward_job<heads> job{.q = hopper::tensor_map(rows_of(p.q), step_rows),
                          .dout = hopper::tensor_map(rows_of(p.dout), step_rows),
                          .out = hopper::tensor_map(rows_of(p.out), step_rows),
                          .dq = hopper::tensor_map(rows_of(p.dq), step_rows),
                          .own_dk = hopper::tensor_map(rows_of(p.dk), step_rows),
                          .own_dv = hopper::tensor_map(rows_of(p.dv), step_rows),
                          .own_k = hopper::tensor_map(rows_of(p.k), step_rows),
                          .own_v = hopper::tensor_map(rows_of(p.v), step_rows),
                          .keys = lattices_of(pattern, p.k, p.v, step_rows),
                          .patterns = patterns,
                          .shape = shape_of(p),
                          .tiles = {{}, ctx.counters(1)},
                          .tiles_of_run = {},
                          .finished = finished,
                          .lse = p.lse,
                          .statistics = as_view(statistics, B, H, padded),
                          .dk = p.dk,
                          .dv = p.dv};
  // A run's end never falls, so its last query tells how far its lattice is used.
  const index_t groups = head_groups(pattern);
  index_t steps = 0, longest = 0;  // of tiles of keys, which walk the queries from a key to its last
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& one) {
      const key_runs last = one.keys(T - 1);
      const int joined = joined_sinks(one);
      for (int r = joined > 0 ? 1 : 0; r < (sees_own_key_alone(one) ? window_run : key_runs::count); ++r) {
        const int indices = on_lattice(last[r]).end + (r == 1 && joined > 0 ? sink_rows : 0);
        const int tiles = (indices + tile_rows - 1) / tile_rows;
        job.tiles_of_run[r] = std::max(job.tiles_of_run[r], tiles);
        for (int i = 0; i < tiles; ++i) {
          const index_t k = std::min(last[r].begin % last[r].step + i * tile_rows * last[r].step, T - 1);
          const index_t end = std::min(one.last_query(k, T) + tile_rows, T), of_tile = ceil_div(end - k, step_rows);
          longest = std::max(longest, of_tile);
          steps += of_tile;
        }
      }
    });
  job.tiles.order = backward_order_of(ctx, p.q, job.tiles_of_run[0] + job.tiles_of_run[1] + job.tiles_of_run[2],
                                      ceil_div(steps, groups), longest);

  const auto with = [&](auto kernel, int bytes) {
    launch(ctx, "attend backward", kernel, blocks_of(ctx, job.tiles.order), 3 * hopper::group_threads, bytes, job);
  };
  if (d <= 64)
    with(attend_backward_sm90<64, heads>, backward_memory<64>::bytes);
  else
    with(attend_backward_sm90<128, heads>, backward_memory<128>::bytes);
}

}  // namespace ratplus::cuda::detail
