#pragma once
// Attention forward on Hopper, bfloat16, for heads of up to 128 channels:
//
//     S = q kᵀ     P = e^{S/√d − m}     out = P v / Σ P     with running maxima m (softmax in one pass over the keys)
//
// One thread block per multiprocessor works through tiles of 128 queries. Its first warp group copies: two warps work
// out which keys each query of the next tiles sees, one feeds queries and tiles of 128 keys into rings, one values. A
// run of every D-th key is a tensor map whose row stride is D rows, so that sparse and dense tiles are the same to
// everything that follows. Two warp groups compute, 64 queries each. What they do is one sequence of steps, each a tile
// of keys, through all tiles of queries: the scores of a step are multiplied while the values of the step before are,
// also when that one belongs to another tile of queries. Only steps that some row sees in part are masked, by the two
// bounds of each row.

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

template <int D, int Runs>
struct forward_memory {
  static constexpr int tile = tile_rows * D * 2;                           // bytes of 128 rows
  static constexpr int stages = D == 128 ? 2 : 4;                          // of keys, and of values
  static constexpr int described = Runs == key_runs::count ? 3 : 2;        // tiles
  static constexpr int results = tile_rows / 16 * 16 * hopper::row_bytes;  // a panel of every warp's 16 rows
  static constexpr int q = 0, k = 2 * tile, v = k + stages * tile, out = v + stages * tile, bounds = out + results;
  static constexpr int bytes = bounds + static_cast<int>(sizeof(row_bounds<Runs>[described])) + 1024;  // alignment
};

template <int Stages, int Described>
struct forward_barriers {
  hopper::barrier described[Described], forgotten[Described], q_full[2], q_empty[2];
  hopper::barrier k_full[Stages], k_empty[Stages], v_full[Stages], v_empty[Stages];
};

/// The number of a use of a ring of Stages buffers: one register where ring_place takes two.
template <int Stages>
struct ring_count {
  unsigned number = 0;

  [[nodiscard]] __device__ unsigned stage() const { return number % Stages; }
  __device__ void wait(hopper::barrier (&full)[Stages]) const {
    full[stage()].wait(static_cast<int>(number / Stages % 2));
  }
};

/// The steps of a tile: the tiles of keys that tile_walk finds. A tile whose queries see nothing, or nothing but their
/// own keys, gets one more that nobody sees, so that every tile has products.
template <int Runs>
struct forward_walk : tile_walk<tile_rows, Runs> {
  bool products = false;
  int end = 0;  // how many of the step's keys any row may see

  __device__ bool next(const row_bounds<Runs>& rows) {
    end = tile_rows;
    if (this->start - tile_rows >= this->first && this->run < Runs) {
      this->start -= tile_rows;
      return true;
    }
    const bool more = tile_walk<tile_rows, Runs>::next(rows);
    if (more) {
      products = products || !at_own(rows);
      end = rows.at[this->run][tile_rows - 1].end - this->start;
      return true;
    }
    if (products) return false;
    this->run = this->first = this->start = end = 0;
    return products = true;
  }
  /// Whether this is the step of the rows' own keys.
  [[nodiscard]] __device__ bool at_own(const row_bounds<Runs>& rows) const {
    return rows.own && this->run == rows.window;
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

template <int D, class Heads, class Past>
__global__ __launch_bounds__(3 * hopper::group_threads,
                             1) void attend_forward_sm90(const __grid_constant__ forward_job<Heads, Past> job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int runs = Past::runs;
  using memory = forward_memory<D, runs>;
  constexpr int stages = memory::stages, described = memory::described, panel_bytes = tile_rows * row_bytes;
  __shared__ forward_barriers<stages, described> bar;
  char* const base = shared_tiles();
  auto& bounds = *reinterpret_cast<row_bounds<runs>(*)[described]>(base + memory::bounds);
  const attend_shape& shape = job.shape;
  const int tiles = job.tiles.order.count();
  constexpr int describing = 64;  // threads

  if (threadIdx.x == 0) {
    constexpr int computing_warps = 8;
    for (int i = 0; i < described; ++i) {
      bar.described[i].init(describing);
      bar.forgotten[i].init(computing_warps + 2);  // and the loading threads
    }
    for (int i = 0; i < 2; ++i) {
      bar.q_full[i].init(1);
      bar.q_empty[i].init(computing_warps);
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
    give_registers<40>();
    if (thread >= 64) {
      describe_tiles<describing>(job.tiles, shape, bounds, bar.described, bar.forgotten, thread - 64,
                                 [&](row_bounds<runs>& rows, const tile_place& at, int row) {
                                   find_bounds(rows, job.patterns, job.keys, job.past, at, row);
                                 });
    } else if (thread % 32 == 0) {
      const bool values = thread > 0;
      ring_place<described> tile;
      ring_place<2> q_at;
      ring_place<stages> at;
      for (bool more = true; more; tile.advance()) {
        bar.described[tile.stage].wait(tile.parity);
        const row_bounds<runs>& rows = bounds[tile.stage];
        more = rows.next < tiles;
        if (!values) {
          bar.q_empty[q_at.stage].wait(q_at.parity ^ 1);
          bar.q_full[q_at.stage].arrive_expecting(memory::tile);
          load_tile<D, tile_rows>(base + memory::q + q_at.stage * memory::tile, job.q, bar.q_full[q_at.stage],
                                  rows.number * tile_rows, rows.h, rows.b);
          q_at.advance();
        }
        for (forward_walk<runs> walk; walk.next(rows); at.advance()) {
          const lattice& from = job.keys.at[rows.lattice[walk.run]];
          const int joined = walk.run == rows.anchors ? rows.sinks : 0;
          barrier& full = values ? bar.v_full[at.stage] : bar.k_full[at.stage];
          (values ? bar.v_empty : bar.k_empty)[at.stage].wait(at.parity ^ 1);
          full.arrive_expecting(memory::tile);
          load_keys<D, tile_rows>(base + (values ? memory::v : memory::k) + at.stage * memory::tile,
                                  values ? from.v : from.k, values ? job.keys.v_sinks : job.keys.k_sinks, joined, full,
                                  walk.start, from.pooled ? 0 : rows.h, rows.b);
        }
        bar.forgotten[tile.stage].arrive();
      }
    }
  } else {
    take_registers<232>();
    const int lane = thread % 32, first_row = 64 * group + thread / 32 * 16;  // of this warp's 16
    const int row = first_row + lane / 4;
    const float scale = shape.scale * log2_e;
    const int group_id = 4 + group;  // named barrier

    ring_count<described> tile;
    ring_count<stages> keys, values;
    forward_walk<runs> walk;
    float out[D / 2], s[tile_rows / 2], shrink[2];
    std::uint32_t p[8][4];
    running_softmax softmax;
    bool accumulate;  // whether `out` holds anything
    bool masked;      // whether a row of the group misses some of the step's keys

    const auto rows_of_tile = [&]() -> const row_bounds<runs>& { return bounds[tile.stage()]; };
    const auto q_number = [&] { return ring_count<2>{tile.number}; };
    const auto q_of_tile = [&] { return base + memory::q + q_number().stage() * memory::tile; };
    const auto k_of = [&](ring_count<stages> at) { return base + memory::k + at.stage() * memory::tile; };
    const auto v_of = [&](ring_count<stages> at) { return base + memory::v + at.stage() * memory::tile; };
    const auto release = [&](barrier& empty) {
      if (lane == 0) empty.arrive();
    };
    const auto release_after_reads = [&](barrier& empty) {
      __syncwarp();
      release(empty);
    };

    const auto multiply_keys = [&] {
      const std::uint64_t q_rows = operand(q_of_tile() + 64 * group * row_bytes), k_rows = operand(k_of(keys));
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        const int at = c / 4 * panel_bytes + c % 4 * 32;
        product(s, advanced(q_rows, at), advanced(k_rows, at), c > 0);
      }
      wgmma_commit();
    };
    // `end`: how many of the tile's values are known to be numbers.
    const auto multiply_values = [&](int end) {
      values.wait(bar.v_full);
      if (end < tile_rows) zero_rows<D, tile_rows>(v_of(values), end, thread, group_id);
      const std::uint64_t v_rows = operand(v_of(values), panel_bytes);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < 8; ++c) product<true>(out, p[c], advanced(v_rows, c * 16 * row_bytes), accumulate || c > 0);
      wgmma_commit();
    };
    const auto look_at_step = [&] {
      const lattice_range* const seen = &rows_of_tile().at[walk.run][64 * group];
      masked = seen[63].begin > walk.start || seen[0].end < walk.start + tile_rows;
    };
    const auto take_scores = [&] {
      if (masked) mask_columns(s, rows_of_tile().at[walk.run], row, walk.start, lane);
      softmax.add(s, scale, shrink);
    };
    const auto shrink_sums = [&] {
#pragma unroll
      for (int j = 0; j < D / 2; ++j) out[j] *= shrink[(j >> 1) & 1];
    };

    // Takes up a tile: its first step, and the softmax over each row's own key, whose score is the maximum so far and 1
    // the sum.
    const auto enter_tile = [&] {
      tile.wait(bar.described);
      const row_bounds<runs>& rows = rows_of_tile();
      walk = {};
      walk.next(rows);
      softmax = {};
      q_number().wait(bar.q_full);
      if (!rows.own) return;
      walk.next(rows);
      keys.wait(bar.k_full);
      const int here = computed_here(lane);
      multiply_own<D, tile_rows, tile_rows>(q_of_tile(), first_row + here / 4, k_of(keys), first_row + here / 4, here,
                                            softmax.max);
      release_after_reads(bar.k_empty[keys.stage()]);
      ++keys.number;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const lattice_range own = rows.at[rows.window][row + 8 * half];
        if (own.begin == own.end) softmax.max[half] = -INFINITY;
        softmax.sum[half] = own.begin < own.end && lane % 4 == 0 ? 1.0f : 0.0f;
      }
    };
    // The sums over the rows' own keys, when the tile's first scores have been taken.
    const auto begin_sums = [&] {
      const row_bounds<runs>& rows = rows_of_tile();
      accumulate = rows.own;
      if (!accumulate) return;
      values.wait(bar.v_full);
      if (rows.used - rows.number * tile_rows < tile_rows && rows.used < shape.T)
        zero_rows<D, tile_rows>(v_of(values), max(rows.used - rows.number * tile_rows, 0), thread, group_id);
      // The product of a diagonal matrix of the weights and the values, in blocks of 16 × 16.
      const auto here = static_cast<unsigned>(computed_here(lane));
      const bool diagonal = here % 4 == here / 8, odd = here / 4 % 2 == 1;
      const auto weight = [&](float x) { return diagonal ? rounded_pair(odd ? 0 : x, odd ? x : 0) : 0; };
      const std::uint32_t weights[4] = {weight(shrink[0]), 0, 0, weight(shrink[1])};
      const block_rows<tile_rows> v(v_of(values), first_row, here);
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        std::uint32_t block[4];
        load_blocks_transposed(v[c], block);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float sum[4] = {};
          product_of_blocks(sum, weights, block[2 * j], block[2 * j + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) out[8 * c + 4 * j + i] = sum[i];
        }
      }
      release_after_reads(bar.v_empty[values.stage()]);
      ++values.number;
    };
    // The factors of a tile's results, when all its scores have been taken.
    const auto finish_softmax = [&](float(&inverse)[2]) {
      const row_bounds<runs>& rows = rows_of_tile();
      softmax.finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = rows.number * tile_rows + row + 8 * half;
        if (job.lse && lane % 4 == 0 && t < shape.T)
          job.lse(rows.b, rows.h, t) =
              t < rows.used ? (softmax.max[half] * scale + log2_fast(softmax.sum[half])) / log2_e : 0.0f;
        inverse[half] = reciprocal_fast(softmax.sum[half]);
      }
    };
    const auto store_tile = [&](const float(&inverse)[2], ring_count<described> done) {
      const row_bounds<runs>& rows = bounds[done.stage()];
      store_warp_rows<D>(out, inverse, base + memory::out + first_row * row_bytes, job.out, rows,
                         rows.number * tile_rows + first_row, lane);
      release_after_reads(bar.forgotten[done.stage()]);
    };

    enter_tile();
    keys.wait(bar.k_full);
    multiply_keys();
    look_at_step();
    wgmma_wait<0>();
    pin(s);
    release(bar.k_empty[keys.stage()]);
    ++keys.number;
    take_scores();
    begin_sums();
    round_fragment(s, p);
    float inverse[2];
    for (;;) {
      const row_bounds<runs>& before = rows_of_tile();
      // Anchors that no query sees yet are keys like the others.
      const bool known = std::is_same_v<Past, no_past> && walk.run == before.anchors && before.used == shape.T;
      const int end = known ? tile_rows : walk.end;
      const bool same_tile = walk.next(before);
      if (!same_tile) {
        finish_softmax(inverse);
        if (before.next >= tiles) {
          multiply_values(end);
          break;
        }
        release_after_reads(bar.q_empty[q_number().stage()]);
        ++tile.number;
        enter_tile();
      }
      keys.wait(bar.k_full);
      multiply_keys();
      multiply_values(end);
      look_at_step();
      wgmma_wait<1>();
      pin(s);
      release(bar.k_empty[keys.stage()]);
      ++keys.number;
      take_scores();
      wgmma_wait<0>();
      pin(out);
      release(bar.v_empty[values.stage()]);
      ++values.number;
      if (same_tile) {
        accumulate = true;
        shrink_sums();
      } else {
        store_tile(inverse, {tile.number - 1});
        begin_sums();
      }
      round_fragment(s, p);
    }
    wgmma_wait<0>();
    pin(out);
    store_tile(inverse, tile);
  }
#endif
}

/// Queues the kernel; p.q, p.out and p.lse are read of p.
template <class Heads, class Past, class Args>
void launch_forward_tiles(context& ctx, const Heads& patterns, const lattices& keys, const Past& past, const Args& p) {
  const forward_job<Heads, Past> job{.q = hopper::tensor_map(rows_of(p.q), tile_rows),
                                     .keys = keys,
                                     .patterns = patterns,
                                     .past = past,
                                     .shape = shape_of(p),
                                     .tiles = {order_of(p.q), ctx.counters(1)},
                                     .out = p.out,
                                     .lse = p.lse};
  const int blocks = blocks_of(ctx, job.tiles.order);
  const auto with = [&](auto kernel, int bytes) {
    launch(ctx, "attend", kernel, blocks, 3 * hopper::group_threads, bytes, job);
  };
  if (p.q.extent(3) <= 64)
    with(attend_forward_sm90<64, Heads, Past>, forward_memory<64, Past::runs>::bytes);
  else
    with(attend_forward_sm90<128, Heads, Past>, forward_memory<128, Past::runs>::bytes);
}

template <class P, class Args>
void attend_forward_tiles(context& ctx, const P& pattern, const Args& p) {
  launch_forward_tiles(ctx, on_device(pattern, p.q.extent(1)), lattices_of(pattern, p.k, p.v, tile_rows), no_past{}, p);
}

}  // namespace ratplus::cuda::detail
