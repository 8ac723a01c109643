#pragma once
// Attention forward on Hopper, bfloat16, for heads of up to 128 channels:
//
//     S = q kᵀ     P = e^{S/√d − m}     out = P v / Σ P     with running maxima m (softmax in one pass over the keys)
//
// One thread block per multiprocessor works through tiles of 192 queries. Of its first warp group one warp works out
// which keys each query of the next tiles sees, one feeds steps of 64 keys into a ring, one their values, and one loads
// queries and stores results, which take the place of their queries. A run of every D-th key is a tensor map whose row
// stride is D rows, so that sparse and dense tiles are the same to everything that follows. Three warp groups compute,
// 64 queries each, every one on its own: scores, softmax, products with the values, one after the other, of two steps
// at once where it can. A warp that issues a product waits for the tensor cores, so that there is little to gain from
// overlapping the two inside a group; while one group does the one, the others do the other. Each group leaves out the
// steps that none of its rows sees, and masks only what some row sees in part, by the two bounds of each row.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// Past: no_past, or past_rows (attend_past.cuh).
template <class Heads, class Past>
struct forward_job {
  CUtensorMap q, out;
  lattices keys;
  Heads patterns;
  Past past;
  attend_shape shape;
  tile_queue tiles;
  view<float, 3> lse;           // (B, H, T), absent: not wanted
  view<const float, 3> scores;  // (B, H, T), q · k of queries with their own keys; absent: those keys are loaded
};

/// Groups of 64 queries, and those of a tile; keys of a step, which the copy engine moves at once.
inline constexpr int forward_groups = 3, forward_rows = 64 * forward_groups, forward_step = 64;

template <int D, int Runs>
struct forward_memory {
  static constexpr bool past = Runs != key_runs::count;
  static constexpr int q_rows = 64 * D * 2;       // bytes of a group's queries
  static constexpr int queries = past ? 4 : 5;    // stages, each for a group's queries or results
  static constexpr int stages = 4 * 128 / D;      // of keys, and of values
  static constexpr int described = past ? 2 : 3;  // tiles
  // All steps' keys lie in one tile of panels, so that two of them side by side are an operand like one.
  static constexpr int rows = stages * forward_step, ring = rows * D * 2, panel = rows * hopper::row_bytes;
  static constexpr int q = 0, k = queries * q_rows, v = k + ring, bounds = v + ring;
  static constexpr int bytes =
      bounds + static_cast<int>(sizeof(row_bounds<Runs, forward_rows>[described])) + 1024;  // alignment
};

template <int Queries, int Stages, int Described>
struct forward_barriers {
  hopper::barrier described[Described], forgotten[Described];
  hopper::barrier q_full[Queries], results[Queries];  // results: of a group, in the place of its queries
  hopper::barrier k_full[Stages], k_empty[Stages], v_full[Stages], v_empty[Stages];
  struct {
    int t, h, b;
  } rows[Queries];  // in the places of queries
};

/// The runs of a tile that have steps, in their order: the window first, then anchors, then sinks. take(run, first,
/// end) gets the first key and the one after the last. A tile whose queries see nothing, or nothing but their own keys,
/// gets one more step that nobody sees, so that every tile has products.
template <int Runs, class Take>
__device__ inline void for_runs(const row_bounds<Runs, forward_rows>& rows, Take&& take) {
  bool products = false;
#pragma unroll 1
  for (int run = Runs - 1; run >= -1; --run) {
    const bool last = run < 0;
    if (last && products) break;
    const int first = last ? 0 : rows.first(run), end = last ? 1 : rows.at[run][forward_rows - 1].end;
    if (end <= first) continue;
    products = products || !rows.own || run != rows.window;
    take(last ? 0 : run, first, end);
  }
}

/// The steps of 64 keys of these runs for a group of 64 rows from first_row on, without those that none of them sees;
/// the last step of a tile that has no others for them.
template <int Runs>
struct group_walk {
  using rows_t = row_bounds<Runs, forward_rows>;
  int run = Runs, start = 0;  // of the step
  int last = 0, after = 0;    // start of the run's last step that the group sees, and how many steps follow that
  bool any = false;

  /// Counts in `passed` the steps between this one and the next.
  __device__ bool next(const rows_t& rows, int first_row, int& passed) {
    passed = 0;
    if (start < last) {
      start += forward_step;
      return true;
    }
    passed = after;
    int lowest = Runs, lowest_last = 0;  // the last run that has steps, and the start of its last
    while (--run >= 0) {
      const int first = rows.first(run), n = rows.at[run][forward_rows - 1].end - first;
      if (n <= 0) continue;
      const int steps = (n + forward_step - 1) / forward_step;
      lowest = run, lowest_last = first + (steps - 1) * forward_step;
      const int begin = rows.at[run][first_row].begin, end = rows.at[run][first_row + 63].end;
      if (end <= begin || rows.number * forward_rows + first_row >= rows.used) {
        passed += steps;
        continue;
      }
      const int from = (begin - first) / forward_step, to = (end - first + forward_step - 1) / forward_step;
      passed += from;
      after = steps - to;
      start = first + from * forward_step;
      last = first + (to - 1) * forward_step;
      return any = true;
    }
    if (any) return false;
    after = 0;
    start = last = lowest_last;
    run = lowest == Runs ? 0 : lowest;
    if (lowest < Runs) --passed;
    return any = true;
  }
  /// Whether the group sees the step after this one too, and it is of the same run.
  [[nodiscard]] __device__ bool goes_on() const { return start < last; }
};

/// Softmax of two rows of a 64-row fragment, in one pass over the keys. `max` need only be near the maximum, so that no
/// weight e^{s − max} is too large: it stays as it is until a score exceeds it by more than `slack`, which is rare
/// after the first keys, and what was summed need not be scaled at every step.
struct running_softmax {
  static constexpr float slack = 8;  // log2 of the largest weight

  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this thread's columns

  /// Replaces scores s by e^{scale s − max}, given log2(e) · scale; returns whether what was summed before shrinks, the
  /// same for all lanes of a warp, and by how much.
  template <int N>
  [[nodiscard]] __device__ bool add(float (&s)[N], float scale, float (&shrink)[2]) {
    float top[2] = {max[0], max[1]}, of_odd[2] = {s[1], s[3]}, shift[2];
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
      of_odd[i / 2 % 2] = fmaxf(of_odd[i / 2 % 2], s[i + 1]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], of_odd[h]);
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    }
    const auto shift_of = [&](float x) { return x == -INFINITY ? 0.0f : x * scale; };  // no key seen yet
    const bool shrinks = __any_sync(~0u, (top[0] - max[0]) * scale > slack || (top[1] - max[1]) * scale > slack);
    if (shrinks) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shrink[h] = hopper::exp2_fast(max[h] * scale - shift_of(top[h]));
        max[h] = top[h];
        sum[h] *= shrink[h];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) shift[h] = shift_of(max[h]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = hopper::exp2_fast(s[i] * scale - shift[(i >> 1) & 1]);
      sum[(i >> 1) & 1] += s[i];
    }
    return shrinks;
  }

  /// The sums of whole rows.
  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }
};

/// Writes a warp's 16 × D fragment, rows scaled by `scale`, to rows `row` … of a tile of 64.
template <int D>
__device__ inline void write_warp_rows(const float (&x)[D / 2], const float (&scale)[2], char* tile, int row,
                                       int lane) {
  using namespace hopper;
  const block_rows<64> blocks(tile, row, static_cast<unsigned>(computed_here(lane)));
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    std::uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      word[j] = rounded_pair(x[8 * c + 2 * j] * scale[j & 1], x[8 * c + 2 * j + 1] * scale[j & 1]);
    store_blocks(blocks[c], word[0], word[1], word[2], word[3]);
  }
}

template <int D, class Heads, class Past>
__global__ __launch_bounds__((forward_groups + 1) * hopper::group_threads,
                             1) void attend_forward_sm90(const __grid_constant__ forward_job<Heads, Past> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int runs = Past::runs;
  using memory = forward_memory<D, runs>;
  using bounds_t = row_bounds<runs, forward_rows>;
  constexpr int queries = memory::queries, stages = memory::stages, described = memory::described;
  __shared__ forward_barriers<queries, stages, described> bar;
  char* const base = shared_tiles();
  auto& bounds = *reinterpret_cast<bounds_t(*)[described]>(base + memory::bounds);
  const attend_shape& shape = job.shape;
  const int tiles = job.tiles.order.count();
  constexpr int describing = 32;  // threads

  if (threadIdx.x == 0) {
    constexpr int group_warps = 4, computing_warps = forward_groups * group_warps;
    for (int i = 0; i < described; ++i) {
      bar.described[i].init(describing);
      bar.forgotten[i].init(computing_warps + 3);  // and the loading threads
    }
    for (int i = 0; i < queries; ++i) {
      bar.q_full[i].init(1);
      bar.results[i].init(group_warps);
    }
    for (int i = 0; i < stages; ++i) {
      bar.k_full[i].init(1);
      bar.v_full[i].init(1);
      bar.k_empty[i].init(computing_warps);
      bar.v_empty[i].init(computing_warps);
    }
    publish_barriers();
  }
  __syncthreads();

  const int warp_of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // known as one value of the warp
  const int group = warp_of_block / 4 - 1, warp = warp_of_block % 4;                  // group −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads;

  if (group < 0) {
    give_registers<32>();
    if (warp == 3) {
      describe_tiles<describing, forward_rows>(job.tiles, shape, bounds, bar.described, bar.forgotten, thread % 32,
                                               [&](bounds_t& rows, const tile_place& at, int row) {
                                                 find_bounds(rows, job.patterns, job.keys, job.past, at, row);
                                               });
    } else if (elected()) {
      if (warp == 2) {
        // Queries are loaded where the results of earlier ones have been stored.
        ring_place<described> tile;
        ring_place<queries> at;
        int used = 0;  // places
        const auto store = [&] {
          char* const from = base + memory::q + at.stage * memory::q_rows;
          const auto& of = bar.rows[at.stage];
          bar.results[at.stage].wait(at.parity ^ 1);
          for (int c = 0; c < D; c += panel_channels) store_panel(job.out, from + c * 64 * 2, c, of.t, of.h, of.b);
          commit_stores();
          wait_stores_read();
        };
        for (bool more = true; more; tile.advance()) {
          bar.described[tile.stage].wait(tile.parity);
          const bounds_t& rows = bounds[tile.stage];
          more = rows.next < tiles;
#pragma unroll 1
          for (int i = 0; i < forward_groups; ++i, at.advance()) {
            if (used == queries)
              store();
            else
              ++used;
            const int t = rows.number * forward_rows + 64 * i;
            barrier& full = bar.q_full[at.stage];
            full.arrive_expecting(memory::q_rows);
            load_tile<D, 64>(base + memory::q + at.stage * memory::q_rows, job.q, full, t, rows.h, rows.b);
            bar.rows[at.stage] = {t, rows.h, rows.b};
          }
          bar.forgotten[tile.stage].arrive();
        }
        at.advance(queries - used);
#pragma unroll 1
        for (; used > 0; --used, at.advance()) store();
      } else {
        const bool values = warp == 1;
        barrier *const full = values ? bar.v_full : bar.k_full, *const empty = values ? bar.v_empty : bar.k_empty;
        char* const to = base + (values ? memory::v : memory::k);
        const CUtensorMap& sinks = values ? job.keys.v_sinks : job.keys.k_sinks;
        ring_place<described> tile;
        ring_place<stages> at;
        for (bool more = true; more; tile.advance()) {
          bar.described[tile.stage].wait(tile.parity);
          const bounds_t& rows = bounds[tile.stage];
          more = rows.next < tiles;
          const int h = rows.h, b = rows.b;
          for_runs(rows, [&](int run, int start, int end) {
            const lattice& lattice = job.keys.at[rows.lattice[run]];
            const lattice_rows& from = values ? lattice.v : lattice.k;
            const int joined = run == rows.anchors ? rows.sinks : 0, of_head = lattice.pooled ? 0 : h;
            const bool scored = !values && job.scores && rows.own && run == rows.window;
#pragma unroll 1
            for (; start < end; start += forward_step) {
              empty[at.stage].wait(at.parity ^ 1);
              if (scored) {
                full[at.stage].arrive();  // nothing is read of the place
              } else {
                full[at.stage].arrive_expecting(memory::ring / stages);
                load_keys<D, memory::rows>(to + at.stage * forward_step * row_bytes, from, sinks, joined,
                                           full[at.stage], start, of_head, b);
              }
              at.advance();
            }
          });
          bar.forgotten[tile.stage].arrive();
        }
      }
    }
  } else {
    take_registers<160>();
    const int lane = thread % 32, group_row = warp * 16;  // the first of this warp's 16 rows
    const int first_row = 64 * group + group_row, row = first_row + lane / 4;
    const float scale = shape.scale * log2_e;
    const int group_id = 4 + group;  // named barrier

    ring_place<described> tile;
    ring_place<queries> q_at;
    q_at.advance(group);
    ring_place<stages> at;
    float out[D / 2], shrink[2];
    running_softmax softmax;

    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };
    const auto release_after_reads = [&](barrier& empty) {
      __syncwarp();
      release(empty);
    };
    char *const k_ring = base + memory::k, *const v_ring = base + memory::v;
    // Lets steps pass that no row of the group sees. Whoever frees a place must have seen it filled.
    const auto pass = [&](int steps) {
#pragma unroll 1
      for (; steps > 0; --steps) {
        bar.k_full[at.stage].wait(at.parity);
        bar.v_full[at.stage].wait(at.parity);
        release_after_reads(bar.k_empty[at.stage]);
        release(bar.v_empty[at.stage]);
        at.advance();
      }
    };

    for (bool more = true; more; tile.advance()) {
      bar.described[tile.stage].wait(tile.parity);
      const bounds_t& rows = bounds[tile.stage];
      more = rows.next < tiles;
      const int t0 = rows.number * forward_rows;
      char* const q = base + memory::q + q_at.stage * memory::q_rows;
      softmax = {};
      group_walk<runs> walk;
      const bool scored = rows.own && job.scores;
      if (scored)  // asked for now, looked at after the waits
#pragma unroll
        for (int half = 0; half < 2; ++half)
          softmax.max[half] = job.scores(rows.b, rows.h, min(t0 + row + 8 * half, shape.T - 1));
      bar.q_full[q_at.stage].wait(q_at.parity);
      if (rows.own) {
        // Each row's own key: its score is the maximum so far, 1 the sum, and its value what is summed.
        const auto here = static_cast<unsigned>(computed_here(lane));
        pass(group);
        walk.run = rows.window;
        const int first = at.stage * forward_step, own_row = first + group_row;  // of the places of keys
        bar.k_full[at.stage].wait(at.parity);
        if (!scored)
          multiply_own<D>(block_rows<64>(q, group_row, here), block_rows<memory::rows>(k_ring, own_row, here), here,
                          softmax.max);
        release_after_reads(bar.k_empty[at.stage]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const lattice_range own = rows.at[rows.window][row + 8 * half];
          if (own.begin == own.end) softmax.max[half] = -INFINITY;
          softmax.sum[half] = own.begin < own.end && lane % 4 == 0 ? 1.0f : 0.0f;
        }
        bar.v_full[at.stage].wait(at.parity);
        if (const int used = rows.used - t0 - 64 * group; used < 64 && rows.used < shape.T)
          zero_rows<D, memory::rows>(v_ring, first + max(used, 0), thread, group_id, first + 64);
        // Copied by a product with a diagonal of ones, in blocks of 16 × 16.
        const bool diagonal = here % 4 == here / 8, odd = here / 4 % 2 == 1;
        const std::uint32_t one = diagonal ? rounded_pair(odd ? 0 : 1, odd ? 1 : 0) : 0, ones[4] = {one, 0, 0, one};
        const block_rows<memory::rows> v(v_ring, own_row, here);
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          std::uint32_t block[4];
          load_blocks_transposed(v[c], block);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float sum[4] = {};
            product_of_blocks(sum, ones, block[2 * j], block[2 * j + 1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) out[8 * c + 4 * j + i] = sum[i];
          }
        }
        release_after_reads(bar.v_empty[at.stage]);
        at.advance();
        pass(forward_groups - 1 - group);
      } else {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] = 0;
      }

      int passed;
      bool same_tile = walk.next(rows, 64 * group, passed);
      const std::uint64_t q_rows = operand_of_warp(q);
      // A step or two at once, which lie side by side and of which the group sees something; finds the next.
      const auto take = [&](auto at_once) {
        constexpr int places = decltype(at_once)::value, Seen = places * forward_step;
        float s[Seen / 2];
        std::uint32_t p[Seen / 16][4];
        const lattice_range(&of_run)[forward_rows] = rows.at[walk.run];
        const int start = walk.start, first = at.stage * forward_step;
        const std::uint64_t k_rows = operand_of_warp(k_ring + first * row_bytes);
        for (int i = 0; i < places; ++i) bar.k_full[at.stage + i].wait(at.parity);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
          product(s, advanced(q_rows, c / 4 * 64 * row_bytes + c % 4 * 32),
                  advanced(k_rows, c / 4 * memory::panel + c % 4 * 32), c > 0);
        wgmma_commit();
        // How many of the step's values are known to be numbers. Anchors that no query sees yet are keys like others.
        const bool known = std::is_same_v<Past, no_past> && walk.run == rows.anchors && rows.used == shape.T;
        const int end = known ? Seen : of_run[forward_rows - 1].end - start;
        const bool partly = of_run[64 * group + 63].begin > start || of_run[64 * group].end < start + Seen;
        wgmma_wait<0>();
        hopper::pin(s);
        for (int i = 0; i < places; ++i) release(bar.k_empty[at.stage + i]);
        if (partly) mask_columns(s, of_run, row, start, lane);
        if (softmax.add(s, scale, shrink)) {
#pragma unroll
          for (int j = 0; j < D / 2; ++j) out[j] *= shrink[(j >> 1) & 1];
        }
        round_fragment(s, p);

        for (int i = 0; i < places; ++i) bar.v_full[at.stage + i].wait(at.parity);
        if (end < Seen) zero_rows<D, memory::rows>(v_ring, first + max(end, 0), thread, group_id, first + Seen);
        const std::uint64_t v_rows = across_panels(advanced(k_rows, memory::v - memory::k), memory::panel);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < Seen / 16; ++c) product<true>(out, p[c], advanced(v_rows, c * 16 * row_bytes), true);
        wgmma_commit();
        if (places == 2) walk.start += forward_step;
        same_tile = walk.next(rows, 64 * group, passed);
        wgmma_wait<0>();
        hopper::pin(out);
        for (int i = 0; i < places; ++i) release(bar.v_empty[at.stage + i]);
      };
      do {
        pass(passed);
        // Two where the second lies beside the first. Known as one value of the warp in this form, and so the stage is
        // too.
        const int places = walk.goes_on() ? 2 - (at.stage & 1) : 1;
        if (places == 2)
          take(std::integral_constant<int, 2>{});
        else
          take(std::integral_constant<int, 1>{});
        at.advance(places);
      } while (same_tile);
      pass(passed);

      softmax.finish();
      float inverse[2] = {reciprocal_fast(softmax.sum[0]), reciprocal_fast(softmax.sum[1])};
      if (rows.used < shape.T) {
        // Rows beyond those in use.
#pragma unroll
        for (int j = 0; j < D / 2; ++j)
          if (t0 + row + 8 * (j >> 1 & 1) >= rows.used) out[j] = inverse[j >> 1 & 1] = 0;
      }
      if (job.lse && lane % 4 == 0) {
        constexpr float ln_2 = 1 / log2_e;
        float* const lse = &job.lse(rows.b, rows.h, t0 + row);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int t = t0 + row + 8 * half;
          if (t < shape.T)
            lse[8 * half * job.lse.stride(2)] =
                t < rows.used ? (softmax.max[half] * scale + log2_fast(softmax.sum[half])) * ln_2 : 0.0f;
        }
      }
      release_after_reads(bar.forgotten[tile.stage]);
      write_warp_rows<D>(out, inverse, q, group_row, lane);
      fence_async_proxy();
      release_after_reads(bar.results[q_at.stage]);
      q_at.advance(forward_groups);
    }
  }
#endif
}

/// Queues the kernel; p.q, p.out and p.lse are read of p. `scores`: forward_job.
template <class Heads, class Past, class Args>
void launch_forward_tiles(context& ctx, const Heads& patterns, const lattices& keys, const Past& past, const Args& p,
                          const view<const float, 3>& scores) {
  const forward_job<Heads, Past> job{.q = hopper::tensor_map(rows_of(p.q), 64),
                                     .out = hopper::tensor_map(rows_of(p.out), 64),
                                     .keys = keys,
                                     .patterns = patterns,
                                     .past = past,
                                     .shape = shape_of(p),
                                     .tiles = {order_of(p.q, forward_rows), ctx.counters(1)},
                                     .lse = p.lse,
                                     .scores = scores};
  const int blocks = blocks_of(ctx, job.tiles.order);
  const auto with = [&](auto kernel, int bytes) {
    launch(ctx, "attend", kernel, blocks, (forward_groups + 1) * hopper::group_threads, bytes, job);
  };
  if (p.q.extent(3) <= 64)
    with(attend_forward_sm90<64, Heads, Past>, forward_memory<64, Past::runs>::bytes);
  else
    with(attend_forward_sm90<128, Heads, Past>, forward_memory<128, Past::runs>::bytes);
}

template <class P, class Args>
void attend_forward_tiles(context& ctx, const P& pattern, const Args& p, const view<const float, 3>& scores) {
  launch_forward_tiles(ctx, on_device(pattern, p.q.extent(1)), lattices_of(pattern, p.k, p.v, forward_step), no_past{},
                       p, scores);
}

}  // namespace ratplus::cuda::detail
