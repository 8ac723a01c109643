#pragma once
// Attention forward on Hopper, bfloat16, for heads of up to 128 channels:
//
//     S = q kᵀ     P = e^{S/√d − m}     out = P v / Σ P     with running maxima m (softmax in one pass over the keys)
//
// One thread block per multiprocessor works through tiles of 192 queries. Its first warp group copies: two warps work
// out which keys each query of the next tiles sees, one feeds steps of 128 or 64 keys into a ring, one queries and
// values. A run of every D-th key is a tensor map whose row stride is D rows, so that sparse and dense tiles are the
// same to everything that follows. Three warp groups compute, 64 queries each, every one on its own: scores, softmax,
// products with the values, one after the other. A warp that issues a product waits for the tensor cores, so that there
// is little to gain from overlapping the two inside a group; while one group does the one, the others do the other.
// Each group leaves out the steps, and the halves of steps, that none of its rows sees, and masks only what some row
// sees in part, by the two bounds of each row.

#include "ratplus/backend/cuda/detail/attend_tiles.cuh"

namespace ratplus::cuda::detail {

/// Past: no_past, or past_rows (attend_past.cuh).
template <class Heads, class Past>
struct forward_job {
  CUtensorMap q;
  lattices keys;
  Heads patterns;
  Past past;
  attend_shape shape;
  tile_queue tiles;
  view<bfloat16, 4> out;
  view<float, 3> lse;  // (B, H, T), absent: not wanted
};

/// Groups of 64 queries, and those of a tile; what the copy engine moves at once.
inline constexpr int forward_groups = 3, forward_rows = 64 * forward_groups, forward_box = 64;

/// Keys of a step: 128, with which each key costs least; or 64 for queries that see few keys beside their own and wait
/// for memory rather than for products, since the smaller tiles leave room for the queries of the next tile.
template <int D, int Keys, int Runs>
struct forward_memory {
  static constexpr int q_group = 64 * D * 2, q_tile = forward_groups * q_group, step = Keys * D * 2;  // bytes
  static constexpr int queries = Keys == 128 ? 1 : 2;                                                 // stages
  static constexpr int stages = (Keys == 128 ? 2 : 3) * 128 / D;                    // of keys, and of values
  static constexpr int described = Keys == 128 && Runs == key_runs::count ? 3 : 2;  // tiles
  static constexpr int results = forward_rows * hopper::row_bytes;                  // a panel of every warp's 16 rows
  static constexpr int q = 0, k = queries * q_tile, v = k + stages * step, out = v + stages * step,
                       bounds = out + results;
  static constexpr int bytes =
      bounds + static_cast<int>(sizeof(row_bounds<Runs, forward_rows>[described])) + 1024;  // alignment
};

template <int Queries, int Stages, int Described>
struct forward_barriers {
  hopper::barrier described[Described], forgotten[Described];
  hopper::barrier q_full[Queries][forward_groups], q_empty[Queries][forward_groups];
  hopper::barrier k_full[Stages], k_empty[Stages], v_full[Stages], v_empty[Stages];
};

/// The steps of a tile: the tiles of keys that tile_walk finds. A tile whose queries see nothing, or nothing but their
/// own keys, gets one more that nobody sees, so that every tile has products.
template <int Keys, int Runs>
struct forward_walk : tile_walk<Keys, Runs, forward_rows> {
  using walk_t = tile_walk<Keys, Runs, forward_rows>;
  using rows_t = row_bounds<Runs, forward_rows>;
  bool products = false;

  __device__ bool next(const rows_t& rows) {
    if (walk_t::next(rows)) {
      products = products || !at_own(rows);
      return true;
    }
    if (products) return false;
    this->run = this->first = this->start = 0;
    return products = true;
  }
  /// How many of the step's keys are wanted: of the rows' own, none beyond the tile.
  [[nodiscard]] __device__ int wanted(const rows_t& rows) const {
    return at_own(rows) && this->start + Keys > this->first + forward_rows ? forward_box : Keys;
  }
  /// Whether this is a step of the rows' own keys.
  [[nodiscard]] __device__ bool at_own(const rows_t& rows) const { return rows.own && this->run == rows.window; }
};

/// The same steps for a group of 64 rows from first_row on, without those that none of them sees; the last step of a
/// tile that has no others for them.
template <int Keys, int Runs>
struct group_walk {
  using rows_t = row_bounds<Runs, forward_rows>;
  int run = Runs, start = 0;  // of the step
  int last = 0, after = 0;    // start of the run's last step that the group sees, and how many steps follow that
  bool any = false;

  /// Counts in `passed` the steps between this one and the next.
  __device__ bool next(const rows_t& rows, int first_row, int& passed) {
    passed = 0;
    if (start > last) {
      start -= Keys;
      return true;
    }
    passed = after;
    int lowest = Runs;  // the last run that has steps
    while (--run >= 0) {
      const int first = rows.first(run), n = rows.at[run][forward_rows - 1].end - first;
      if (n <= 0) continue;
      lowest = run;
      const int begin = rows.at[run][first_row].begin, end = rows.at[run][first_row + 63].end;
      const int steps = (n + Keys - 1) / Keys;
      if (end <= begin || rows.number * forward_rows + first_row >= rows.used) {
        passed += steps;
        continue;
      }
      const int from = (begin - first) / Keys, to = (end - first + Keys - 1) / Keys;
      passed += steps - to;
      after = from;
      last = first + from * Keys;
      start = first + (to - 1) * Keys;
      return any = true;
    }
    if (any) return false;
    const bool none = lowest == Runs;
    if (!none) --passed;
    after = 0;
    run = none ? 0 : lowest;
    start = last = none ? 0 : rows.first(run);
    return any = true;
  }
};

/// Softmax of two rows of a 64-row fragment, in one pass over the keys.
struct running_softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this thread's columns

  /// Replaces scores s by e^{scale s − max}, given log2(e) · scale; returns by how much what was summed before shrinks.
  template <int N>
  __device__ void add(float (&s)[N], float scale, float (&shrink)[2]) {
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
      shift[h] = top[h] == -INFINITY ? 0.0f : top[h] * scale;  // no key seen yet
      shrink[h] = hopper::exp2_fast(max[h] * scale - shift[h]);
      max[h] = top[h];
      sum[h] *= shrink[h];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = hopper::exp2_fast(s[i] * scale - shift[(i >> 1) & 1]);
      sum[(i >> 1) & 1] += s[i];
    }
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

/// Stores a warp's 16 × D fragment, rows scaled by `scale`, to rows t0 … of the head of `at`, by way of a panel of 16
/// rows of shared memory. Rows beyond those in use are stored as zeros.
template <int D>
__device__ inline void store_warp_rows(const float (&x)[D / 2], const float (&scale)[2], char* panel,
                                       const view<bfloat16, 4>& to, const tile_place& at, int t0, int lane) {
  using namespace hopper;
  const auto here = static_cast<unsigned>(computed_here(lane));
  const block_rows<16> blocks(panel, 0, here);
  const int first_row = static_cast<int>(here / 8),
            channel = static_cast<int>(here % 8) * 8;  // of this thread's copies
  const index_t rows = 4 * to.stride(2);
  bfloat16* p = to.row(at.b, at.h, t0 + first_row) + channel;
  const auto d = static_cast<int>(to.extent(3)), in_use = at.used - t0, present = static_cast<int>(to.extent(2)) - t0;
  const bool complete = in_use >= 16 && d == D;
#pragma unroll
  for (int c = 0; c < D; c += panel_channels, p += panel_channels) {
    if (c > 0) __syncwarp();
#pragma unroll
    for (int i = 0; i < panel_channels / 16; ++i) {
      std::uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = c / 2 + 8 * i + 2 * j;
        word[j] = rounded_pair(x[k] * scale[j & 1], x[k + 1] * scale[j & 1]);
      }
      store_blocks(blocks[i], word[0], word[1], word[2], word[3]);
    }
    __syncwarp();
    const auto row = [&](int i) {
      return *reinterpret_cast<const uint4*>(panel + chunk_offset(16, first_row + 4 * i, channel / 8));
    };
    if (complete) {
#pragma unroll
      for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(p + i * rows) = row(i);
    } else if (c + channel < d) {
      for (int i = 0; i < 4 && first_row + 4 * i < present; ++i)
        *reinterpret_cast<uint4*>(p + i * rows) = first_row + 4 * i < in_use ? row(i) : uint4{0, 0, 0, 0};
    }
  }
}

template <int D, int Keys, class Heads, class Past>
__global__ __launch_bounds__((forward_groups + 1) * hopper::group_threads,
                             1) void attend_forward_sm90(const __grid_constant__ forward_job<Heads, Past> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int runs = Past::runs;
  using memory = forward_memory<D, Keys, runs>;
  using bounds_t = row_bounds<runs, forward_rows>;
  constexpr int queries = memory::queries, stages = memory::stages, described = memory::described;
  __shared__ forward_barriers<queries, stages, described> bar;
  char* const base = shared_tiles();
  auto& bounds = *reinterpret_cast<bounds_t(*)[described]>(base + memory::bounds);
  const attend_shape& shape = job.shape;
  const int tiles = job.tiles.order.count();
  constexpr int describing = 64;  // threads

  if (threadIdx.x == 0) {
    constexpr int group_warps = 4, computing_warps = forward_groups * group_warps;
    for (int i = 0; i < described; ++i) {
      bar.described[i].init(describing);
      bar.forgotten[i].init(computing_warps + 2);  // and the loading threads
    }
    for (int i = 0; i < queries; ++i)
      for (int j = 0; j < forward_groups; ++j) {
        bar.q_full[i][j].init(1);
        bar.q_empty[i][j].init(group_warps);
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

  const int group = static_cast<int>(threadIdx.x) / group_threads - 1;  // −1 copies
  const int thread = static_cast<int>(threadIdx.x) % group_threads;

  if (group < 0) {
    give_registers<32>();
    if (thread >= 64) {
      describe_tiles<describing, forward_rows>(job.tiles, shape, bounds, bar.described, bar.forgotten, thread - 64,
                                               [&](bounds_t& rows, const tile_place& at, int row) {
                                                 find_bounds(rows, job.patterns, job.keys, job.past, at, row);
                                               });
    } else if (thread % 32 == 0) {
      const bool values = thread > 0;
      ring_place<described> tile;
      ring_place<queries> q_at;
      ring_place<stages> at;
      for (bool more = true; more; tile.advance(), q_at.advance()) {
        bar.described[tile.stage].wait(tile.parity);
        const bounds_t& rows = bounds[tile.stage];
        more = rows.next < tiles;
        // By the thread that loads values: it waits for the place of the queries, and keys are wanted earlier.
        for (int i = 0; values && i < forward_groups; ++i) {
          barrier& full = bar.q_full[q_at.stage][i];
          bar.q_empty[q_at.stage][i].wait(q_at.parity ^ 1);
          full.arrive_expecting(memory::q_group);
          load_tile<D, 64>(base + memory::q + q_at.stage * memory::q_tile + i * memory::q_group, job.q, full,
                           rows.number * forward_rows + 64 * i, rows.h, rows.b);
        }
        for (forward_walk<Keys, runs> walk; walk.next(rows); at.advance()) {
          const lattice& from = job.keys.at[rows.lattice[walk.run]];
          const int joined = walk.run == rows.anchors ? rows.sinks : 0, wanted = walk.wanted(rows);
          barrier& full = values ? bar.v_full[at.stage] : bar.k_full[at.stage];
          (values ? bar.v_empty : bar.k_empty)[at.stage].wait(at.parity ^ 1);
          full.arrive_expecting(memory::step / Keys * wanted);
          load_keys<D, Keys, forward_box>(base + (values ? memory::v : memory::k) + at.stage * memory::step,
                                          values ? from.v : from.k, values ? job.keys.v_sinks : job.keys.k_sinks,
                                          joined, full, walk.start, from.pooled ? 0 : rows.h, rows.b, wanted);
        }
        bar.forgotten[tile.stage].arrive();
      }
    }
  } else {
    take_registers<160>();
    const int lane = thread % 32, group_row = thread / 32 * 16;  // the first of this warp's 16 rows
    const int first_row = 64 * group + group_row, row = first_row + lane / 4;
    const float scale = shape.scale * log2_e;
    const int group_id = 4 + group;  // named barrier

    ring_place<described> tile;
    ring_place<queries> q_at;
    ring_place<stages> keys, values;
    float out[D / 2], shrink[2];
    running_softmax softmax;

    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };
    const auto release_after_reads = [&](barrier& empty) {
      __syncwarp();
      release(empty);
    };
    const auto k_of_step = [&] { return base + memory::k + keys.stage * memory::step; };
    const auto v_of_step = [&] { return base + memory::v + values.stage * memory::step; };
    // Lets steps pass that no row of the group sees. Whoever frees a place must have seen it filled.
    const auto pass = [&](int steps) {
#pragma unroll 1
      for (; steps > 0; --steps) {
        bar.k_full[keys.stage].wait(keys.parity);
        bar.v_full[values.stage].wait(values.parity);
        release_after_reads(bar.k_empty[keys.stage]);
        release(bar.v_empty[values.stage]);
        keys.advance();
        values.advance();
      }
    };

    for (bool more = true; more; tile.advance(), q_at.advance()) {
      bar.described[tile.stage].wait(tile.parity);
      const bounds_t& rows = bounds[tile.stage];
      more = rows.next < tiles;
      const int t0 = rows.number * forward_rows;
      const char* const q = base + memory::q + q_at.stage * memory::q_tile + group * memory::q_group;
      softmax = {};
      group_walk<Keys, runs> walk;
      bar.q_full[q_at.stage][group].wait(q_at.parity);
      if (rows.own) {
        // Each row's own key: its score is the maximum so far, 1 the sum, and its value what is summed.
        const int step = 64 * group / Keys, steps = (forward_rows + Keys - 1) / Keys;
        const int here = computed_here(lane), own_row = first_row % Keys;
        pass(steps - 1 - step);
        walk.run = rows.window;
        bar.k_full[keys.stage].wait(keys.parity);
        multiply_own<D, 64, Keys>(q, group_row + here / 4, k_of_step(), own_row + here / 4, here, softmax.max);
        release_after_reads(bar.k_empty[keys.stage]);
        keys.advance();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const lattice_range own = rows.at[rows.window][row + 8 * half];
          if (own.begin == own.end) softmax.max[half] = -INFINITY;
          softmax.sum[half] = own.begin < own.end && lane % 4 == 0 ? 1.0f : 0.0f;
        }
        bar.v_full[values.stage].wait(values.parity);
        // A group's own 64 rows alone: the others are read by other groups.
        const int own_first = 64 * group % Keys, own_end = own_first + 64, used = rows.used - t0 - step * Keys;
        if (used < own_end && rows.used < shape.T)
          zero_rows<D, Keys>(v_of_step(), max(used, own_first), thread, group_id, own_end);
        // Copied by a product with a diagonal of ones, in blocks of 16 × 16.
        const bool diagonal = static_cast<unsigned>(here) % 4 == static_cast<unsigned>(here) / 8,
                   odd = here / 4 % 2 == 1;
        const std::uint32_t one = diagonal ? rounded_pair(odd ? 0 : 1, odd ? 1 : 0) : 0, ones[4] = {one, 0, 0, one};
        const block_rows<Keys> v(v_of_step(), own_row, static_cast<unsigned>(here));
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
        release_after_reads(bar.v_empty[values.stage]);
        values.advance();
        pass(step);
      } else {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] = 0;
      }

      int passed;
      bool same_tile = walk.next(rows, 64 * group, passed);
      // A step of which the group sees so many keys from the one numbered `from` on; finds the next.
      const auto take_step = [&](auto seen_keys, int from) {
        constexpr int Seen = decltype(seen_keys)::value, panel = Keys * row_bytes;
        float s[Seen / 2];
        std::uint32_t p[Seen / 16][4];
        const lattice_range(&of_run)[forward_rows] = rows.at[walk.run];
        // How many of the step's values are known to be numbers. Anchors that no query sees yet are keys like others.
        const bool known = std::is_same_v<Past, no_past> && walk.run == rows.anchors && rows.used == shape.T;
        const int start = walk.start + from, end = known ? Keys : of_run[forward_rows - 1].end - walk.start;
        const std::uint64_t q_rows = operand_of_warp(q), k_rows = operand_of_warp(k_of_step() + from * row_bytes);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
          product(s, advanced(q_rows, c / 4 * 64 * row_bytes + c % 4 * 32),
                  advanced(k_rows, c / 4 * panel + c % 4 * 32), c > 0);
        wgmma_commit();
        wgmma_wait<0>();
        hopper::pin(s);
        release(bar.k_empty[keys.stage]);
        keys.advance();
        if (of_run[64 * group + 63].begin > start || of_run[64 * group].end < start + Seen)
          mask_columns(s, of_run, row, start, lane);
        softmax.add(s, scale, shrink);
#pragma unroll
        for (int j = 0; j < D / 2; ++j) out[j] *= shrink[(j >> 1) & 1];
        round_fragment(s, p);

        bar.v_full[values.stage].wait(values.parity);
        if (end < from + Seen) zero_rows<D, Keys>(v_of_step(), max(end, from), thread, group_id, from + Seen);
        const std::uint64_t v_rows = operand_of_warp(v_of_step() + from * row_bytes, panel);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < Seen / 16; ++c) product<true>(out, p[c], advanced(v_rows, c * 16 * row_bytes), true);
        wgmma_commit();
        same_tile = walk.next(rows, 64 * group, passed);
        wgmma_wait<0>();
        hopper::pin(out);
        release(bar.v_empty[values.stage]);
        values.advance();
      };
      do {
        pass(passed);
        bar.k_full[keys.stage].wait(keys.parity);
        if constexpr (Keys == forward_box) {
          take_step(std::integral_constant<int, Keys>{}, 0);
        } else {
          const lattice_range* const seen = &rows.at[walk.run][64 * group];
          const int half = walk.start + forward_box;
          const bool low = seen[0].begin < half;
          const bool high = seen[63].end > half;
          if (low && high)
            take_step(std::integral_constant<int, Keys>{}, 0);
          else
            take_step(std::integral_constant<int, forward_box>{}, low ? 0 : forward_box);
        }
      } while (same_tile);
      release(bar.q_empty[q_at.stage][group]);
      pass(passed);

      float inverse[2];
      softmax.finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = t0 + row + 8 * half;
        if (job.lse && lane % 4 == 0 && t < shape.T)
          job.lse(rows.b, rows.h, t) =
              t < rows.used ? (softmax.max[half] * scale + log2_fast(softmax.sum[half])) / log2_e : 0.0f;
        inverse[half] = reciprocal_fast(softmax.sum[half]);
      }
      store_warp_rows<D>(out, inverse, base + memory::out + first_row * row_bytes, job.out, rows, t0 + first_row, lane);
      release_after_reads(bar.forgotten[tile.stage]);
    }
  }
#endif
}

/// Queues the kernel; p.q, p.out and p.lse are read of p.
template <int Keys, class Heads, class Past, class Args>
void launch_forward_tiles(context& ctx, const Heads& patterns, const lattices& keys, const Past& past, const Args& p) {
  const forward_job<Heads, Past> job{.q = hopper::tensor_map(rows_of(p.q), 64),
                                     .keys = keys,
                                     .patterns = patterns,
                                     .past = past,
                                     .shape = shape_of(p),
                                     .tiles = {order_of(p.q, forward_rows), ctx.counters(1)},
                                     .out = p.out,
                                     .lse = p.lse};
  const int blocks = blocks_of(ctx, job.tiles.order);
  const auto with = [&](auto kernel, int bytes) {
    launch(ctx, "attend", kernel, blocks, (forward_groups + 1) * hopper::group_threads, bytes, job);
  };
  if (p.q.extent(3) <= 64)
    with(attend_forward_sm90<64, Keys, Heads, Past>, forward_memory<64, Keys, Past::runs>::bytes);
  else
    with(attend_forward_sm90<128, Keys, Heads, Past>, forward_memory<128, Keys, Past::runs>::bytes);
}

template <class P, class Args>
void attend_forward_tiles(context& ctx, const P& pattern, const Args& p) {
  constexpr index_t few = 1024;  // keys of a query, up to which a tile waits for memory: measured
  const index_t H = p.q.extent(1), groups = head_groups(pattern);
  bool few_beside_own = true;
  for (index_t g = 0; g < groups; ++g)
    visit_head(pattern, g, groups, [&](const auto& each) {
      few_beside_own = few_beside_own && sees_own_key_alone(each) && each.keys(p.q.extent(2) - 1).keys() <= few;
    });
  const lattices keys = lattices_of(pattern, p.k, p.v, forward_box);
  if (few_beside_own)
    launch_forward_tiles<64>(ctx, on_device(pattern, H), keys, no_past{}, p);
  else
    launch_forward_tiles<128>(ctx, on_device(pattern, H), keys, no_past{}, p);
}

}  // namespace ratplus::cuda::detail
