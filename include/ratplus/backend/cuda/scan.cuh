#pragma once
// The recurrence over keys and values with RoPE: one pass over memory. An AssociativeCell is scanned in tiles
// (detail/scan_tiles.cuh), so that a single long sequence uses the whole card; any other cell, and a call of a few
// rows, walks its rows in order, one thread for each pair of channel groups.

#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cuda {

namespace detail {

/// Calls up to this long are walked: a tile would be mostly empty.
inline constexpr index_t walked_rows = 16;

/// Columns of a batch at most.
inline constexpr int most_columns = 8;

/// What blocks of the forward scan work on, in the order of tickets: `batch` consecutive columns each, and of them one
/// tile, tickets of earlier tiles first, or every tile. Whole columns need nothing from other blocks.
struct scan_plan {
  index_t tiles, columns;
  int batch;
  bool whole;
  [[nodiscard]] RATPLUS_HD index_t batches() const { return ceil_div(columns, batch); }
  [[nodiscard]] RATPLUS_HD index_t tickets() const { return whole ? batches() : tiles * batches(); }

  /// Whole columns where that leaves few of `slots` blocks idle, in batches as large as that allows: the columns of a
  /// batch share angles. One tile of one column otherwise.
  scan_plan(const scan_shape& s, index_t tiles_, index_t slots)
      : tiles(tiles_), columns(s.columns), batch(most_columns), whole(true) {
    const auto mostly_busy = [&] { return 10 * batches() >= 9 * slots * ceil_div(batches(), slots); };
    while (batch > 1 && !mostly_busy()) batch /= 2;
    whole = tiles == 1 || mostly_busy();
  }
};

/// A block's place in its work: the batch's columns of one tile, then the next tile, then the next ticket.
struct scan_walk {
  index_t ticket, column, first_column, end_column;
  int tile, end_tile;

  __device__ scan_walk(const scan_plan& plan, index_t first_ticket) { begin(plan, first_ticket); }
  __device__ void begin(const scan_plan& plan, index_t n) {
    ticket = n;
    const auto batches = static_cast<unsigned>(plan.batches());
    tile = static_cast<int>(static_cast<unsigned>(n) / batches);  // 0 of whole columns
    end_tile = plan.whole ? static_cast<int>(plan.tiles) : tile + 1;
    column = first_column = (n - static_cast<index_t>(tile) * batches) * plan.batch;
    end_column = plan.columns - first_column < plan.batch ? plan.columns : first_column + plan.batch;
  }
  [[nodiscard]] __device__ bool last() const { return column + 1 == end_column && tile + 1 == end_tile; }
  __device__ void next(const scan_plan& plan, index_t next_ticket) {
    if (last()) return begin(plan, next_ticket);
    if (++column == end_column) {
      column = first_column;
      ++tile;
    }
  }
};

// Blocks stay and take one tile after another. A tile's rows are read into shared memory, by the thread that uses them:
// whatever row has been used for the last time gives its place to the same row of the next tile, so reading never
// pauses, and nothing of it is held in registers but the angles, which the columns of a batch share. Rows are used
// twice (keys, values, gates: once for the tile's element, once for the states), queries once.

template <class C, class T, int V, int Half, class Size>
__global__ void __launch_bounds__(Size::threads, Size::blocks)
    scan_forward_kernel(C cell, scan_forward_args<T> p, scan_shape s, tile_elements elements, scan_plan plan) {
  constexpr int R = Size::R, W = Size::W, N = 2 * V, threads = Size::threads;
  constexpr bool recurrent = !IdentityCell<C>;
  using owned = owned_words<N, threads>;
  extern __shared__ __align__(16) unsigned char staging[];
  __shared__ affine<float> part[2][W][N][column_lanes];
  __shared__ float carried[most_columns][owned::all];
  __shared__ unsigned taken;
  const int lane_id = threadIdx.x % column_lanes, warp = threadIdx.x / column_lanes;
  const index_t tickets = plan.tickets();

  // This thread's rows in shared memory: it fetches them itself, so nobody else waits for them.
  auto* const staged = reinterpret_cast<row_pair<T, V>*>(staging) + threadIdx.x;
  const auto slot_of = [&](int stream, int r) -> row_pair<T, V>& { return staged[(stream * R + r) * threads]; };
  enum { keys, values, gates, queries };
  struct inputs {
    row_pair<T, V> k, v, g;
  };
  const auto read_row = [&](int r) {
    return inputs{slot_of(keys, r).copy(), slot_of(values, r).copy(), slot_of(gates, r).copy()};
  };
#pragma unroll
  for (int i = 0; i < 4 * R; ++i) slot_of(0, i).clear();

  scan_walk now(plan, elements.ticket != nullptr ? take_ticket(elements.ticket) : blockIdx.x);
  if (now.ticket >= tickets) return;
  {
    const scan_place at(s, now.column, lane_id, V);
    const scan_piece<Size> rows(p.spans, s, at, now.tile);
    const auto fetch = [&](const view<const T, 4>& from, int stream) {
      if (!from) return;
      auto row = thread_rows<const T, V, Half>(from, s, at, rows.t0).row(0);
#pragma unroll
      for (int r = 0; r < R; ++r, ++row)
        if (r < rows.used) row.fetch(slot_of(stream, r));
    };
    fetch(p.k, keys), fetch(p.v, values), fetch(p.q, queries);
    if constexpr (C::gated) fetch(p.gate, gates);
  }

  row_angles<V> angles[R];
  index_t angles_b = -1;
  int angles_tile = -1, angles_channel = -1;
  while (true) {
    const scan_place at(s, now.column, lane_id, V);
    const scan_piece<Size> rows(p.spans, s, at, now.tile);
    const int used = rows.used, tile = now.tile;
    if (p.rope && (angles_b != at.b || angles_tile != tile || angles_channel != at.channel)) {
      angle_cursor<V, Half> row(p.rope, s, at, rows.position);
#pragma unroll
      for (int r = 0; r < R; ++r, ++row)
        if (r < used) angles[r] = row.read();
      angles_b = at.b, angles_tile = tile, angles_channel = at.channel;
    }
    unsigned next_ticket = static_cast<unsigned>(now.ticket) + gridDim.x;
    const bool asks = elements.ticket != nullptr && now.last();
    if (asks && threadIdx.x == 0) next_ticket = atomicAdd(elements.ticket, 1u) + 1u;
    // What the tile before has published: looked at now, it is there when the sums are.
    const bool looks = !plan.whole && tile > 0;
    const index_t column_word = now.column * owned::all;
    tile_elements::word before[owned::count];
    if constexpr (recurrent)
      if (looks)
        owned::for_each([&](int o, int word, int, int) { before[o] = elements.peek(tile - 1, column_word + word); });
    wait_for_copies();

    // The map of row r on channel i of either stream.
    const auto element = [&](const row_pair<T, V>& x, const row_pair<T, V>& g, int r, int i) {
      const affine<lane> e = cell.element(lane(x[i]), lane(C::gated ? g[i] : 0.0f), rows.position + r);
      return affine<float>{e.a.x, e.b.x};
    };
    if constexpr (recurrent) {
      affine<float> sum[2][N];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0][i] = sum[1][i] = affine<float>::identity();
      const auto add = [&](int r) {
        const inputs x = read_row(r);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[0][i] = combine(sum[0][i], element(x.k, x.g, r, i));
          sum[1][i] = combine(sum[1][i], element(x.v, x.g, r, i));
        }
      };
      if (__all_sync(~0u, used == R)) {
#pragma unroll
        for (int r = 0; r < R; ++r) add(r);
      } else {
#pragma unroll 1
        for (int r = 0; r < used; ++r) add(r);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        part[0][warp][i][lane_id] = sum[0][i];
        part[1][warp][i][lane_id] = sum[1][i];
      }
      if (asks && threadIdx.x == 0) taken = next_ticket;
      __syncthreads();
      if (asks) next_ticket = taken;
    }
    scan_walk after = now;
    after.next(plan, next_ticket);
    const bool more = after.ticket < tickets;
    const scan_place next_at(s, more ? after.column : 0, lane_id, V);
    const scan_piece<Size> next_rows(p.spans, s, next_at, after.tile);
    const int next_used = more ? next_rows.used : 0;

    affine<float> whole[owned::count];
    if constexpr (recurrent)
      owned::for_each([&](int o, int word, int chain, int i) {
        whole[o] = affine<float>::identity();
#pragma unroll
        for (int w = 0; w < W; ++w) whole[o] = combine(whole[o], part[chain][w][i][lane_id]);
        if (!looks) return;
        if (tile + 1 < plan.tiles) elements.publish(tile, column_word + word, whole[o]);
        if (!tile_elements::constant(before[o])) before[o] = elements.peek(tile - 1, column_word + word);
      });

    // Whether nothing is missing: then rows follow each other without a branch.
    const bool complete = p.q && p.k && p.v && p.rope && __all_sync(~0u, used == R && next_used == R);
    const auto with_or_without_branches = [&](const auto& f) {
      if (complete)
        f(std::true_type{});
      else
        f(std::false_type{});
    };

    // While the tiles before finish: the queries, which wait for nobody.
    with_or_without_branches([&](auto all) {
      if (!all && !p.q) return;
      auto out = thread_rows<T, V, Half>(p.q_out, s, at, rows.t0).row(0);
      auto in = thread_rows<const T, V, Half>(p.q, s, next_at, next_rows.t0).row(0);
#pragma unroll
      for (int r = 0; r < R; ++r, ++out, ++in) {
        float x[N];
        slot_of(queries, r).copy().widen(x);
        if (all || p.rope) angles[r].template rotate<false>(x);
        if (all || r < used) out.write(x);
        if (all || r < next_used) in.fetch(slot_of(queries, r));
      }
    });

    if constexpr (recurrent) {
      owned::for_each([&](int o, int word, int chain, int i) {
        float& carry = carried[now.column - now.first_column][word];
        float state = tile == 0 ? read_state<V>(chain == 0 ? p.k_first : p.v_first, s, at, i)
                      : looks   ? elements.look_back(tile, column_word + word, before[o]).b
                                : carry;
        const float last = whole[o](state);
        if (tile + 1 == plan.tiles) {
          // The last state may lie where the first one was read.
          if (looks) elements.wait_for_first(column_word + word);
          write_state<V>(chain == 0 ? p.k_last : p.v_last, s, at, i, last);
        } else if (plan.whole) {
          carry = last;
        } else {
          elements.publish(tile, column_word + word, {0.0f, last});
        }
#pragma unroll
        for (int w = 0; w < W; ++w) {
          affine<float>& e = part[chain][w][i][lane_id];
          const float next = e(state);
          e.b = state;  // before the warp's first row
          state = next;
        }
      });
      __syncthreads();
    }
    float state[2][N];
    if constexpr (recurrent)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        state[0][i] = part[0][warp][i][lane_id].b;
        state[1][i] = part[1][warp][i][lane_id].b;
      }
    with_or_without_branches([&](auto all) {
      auto k_row = thread_rows<T, V, Half>(p.k_out, s, at, rows.t0).row(0);
      auto v_row = thread_rows<T, V, Half>(p.v_out, s, at, rows.t0).row(0);
      auto k_in = thread_rows<const T, V, Half>(p.k, s, next_at, next_rows.t0).row(0);
      auto v_in = thread_rows<const T, V, Half>(p.v, s, next_at, next_rows.t0).row(0);
      auto g_in = thread_rows<const T, V, Half>(p.gate, s, next_at, next_rows.t0).row(0);
      inputs ahead = read_row(0);
#pragma unroll
      for (int r = 0; r < R; ++r, ++k_row, ++v_row, ++k_in, ++v_in, ++g_in) {
        const inputs in = ahead;
        if (r + 1 < R) ahead = read_row(r + 1);
        if (all || r < used) {
          if constexpr (recurrent) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
              state[0][i] = element(in.k, in.g, r, i)(state[0][i]);
              state[1][i] = element(in.v, in.g, r, i)(state[1][i]);
            }
          } else {
            in.k.widen(state[0]);
            in.v.widen(state[1]);
            if (rows.t0 + r + 1 == rows.end)
              for (int i = 0; i < N; ++i) {
                if (p.k) write_state<V>(p.k_last, s, at, i, state[0][i]);
                if (p.v) write_state<V>(p.v_last, s, at, i, state[1][i]);
              }
          }
          if (all || p.v) v_row.write(state[1]);
          if (all || p.k) {
            float x[N];
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = state[0][i];
            if (all || p.rope) angles[r].template rotate<false>(x);
            k_row.write(x);
          }
        }
        if (all || r < next_used) {
          if (all || p.k) k_in.fetch(slot_of(keys, r));
          if (all || p.v) v_in.fetch(slot_of(values, r));
          if constexpr (C::gated) g_in.fetch(slot_of(gates, r));
        }
      }
    });
    if constexpr (!recurrent)
      if (rows.end == 0 && rows.t0 == 0)
        for (int i = 0; i < N; ++i) {
          if (p.k) write_state<V>(p.k_last, s, at, i, read_state<V>(p.k_first, s, at, i));
          if (p.v) write_state<V>(p.v_last, s, at, i, read_state<V>(p.v_first, s, at, i));
        }
    const float zeros[N] = {};
    for (int r = used; r < rows.present; ++r) {
      if (p.q) thread_rows<T, V, Half>(p.q_out, s, at, rows.t0).row(r).write(zeros);
      if (p.k) thread_rows<T, V, Half>(p.k_out, s, at, rows.t0).row(r).write(zeros);
      if (p.v) thread_rows<T, V, Half>(p.v_out, s, at, rows.t0).row(r).write(zeros);
    }
    if (!more) break;
    now = after;
  }
}

/// Any cell, row after row. One thread for each place.
template <class C, class T>
__global__ void __launch_bounds__(128) scan_forward_walk(C cell, scan_forward_args<T> p, scan_shape s) {
  wait_for_previous();
  constexpr int V = 1, N = 2, ahead = 4;  // rows read at once
  const index_t column = static_cast<index_t>(blockIdx.x) * 4 + threadIdx.x / column_lanes;
  const scan_place at(s, column, threadIdx.x % column_lanes, V);
  if (!at.active) return;
  const scan_rows rows(p.spans, at.b, s.T, true);
  angle_cursor<V, 0> angles(p.rope, s, at, rows.first);
  const thread_rows<const T, V, 0> k(p.k, s, at, 0), v(p.v, s, at, 0), gate(p.gate, s, at, 0), q(p.q, s, at, 0);
  const thread_rows<T, V, 0> k_out(p.k_out, s, at, 0), v_out(p.v_out, s, at, 0), q_out(p.q_out, s, at, 0);
  lane ks[N], vs[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    ks[i] = read_state<V>(p.k_first, s, at, i);
    vs[i] = read_state<V>(p.v_first, s, at, i);
  }
  auto q_row = q_out.row(0), k_row = k_out.row(0), v_row = v_out.row(0);
  for (index_t t0 = 0; t0 < rows.used; t0 += ahead) {
    row_pair<T, V> kr[ahead], vr[ahead], gr[ahead], qr[ahead];
    const int left = rows.used - t0 < ahead ? static_cast<int>(rows.used - t0) : ahead;
    k.read(t0, left, kr);
    v.read(t0, left, vr);
    gate.read(t0, left, gr);
    q.read(t0, left, qr);
#pragma unroll
    for (int r = 0; r < ahead; ++r, ++angles, ++q_row, ++k_row, ++v_row) {
      if (r >= left) break;
      const index_t position = rows.first + t0 + r;
      float x[N], g[N];
      gr[r].widen(g);
      if (q) {
        qr[r].widen(x);
        if (angles) angles.template rotate<false>(x);
        q_row.write(x);
      }
      if (k) {
        kr[r].widen(x);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = (ks[i] = cell.step(ks[i], lane(x[i]), lane(g[i]), position)).x;
        if (angles) angles.template rotate<false>(x);
        k_row.write(x);
      }
      if (v) {
        vr[r].widen(x);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = (vs[i] = cell.step(vs[i], lane(x[i]), lane(g[i]), position)).x;
        v_row.write(x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (k) write_state<V>(p.k_last, s, at, i, ks[i].x);
    if (v) write_state<V>(p.v_last, s, at, i, vs[i].x);
  }
  const float zeros[N] = {};
  for (index_t t = rows.used; t < s.T; ++t) {
    if (q) q_out.row(t).write(zeros);
    if (k) k_out.row(t).write(zeros);
    if (v) v_out.row(t).write(zeros);
  }
}

// Backwards, with D_t the gradient of state t from outside (dk_out rotated back, dv_out) and c_t what step t passes on
// to state t − 1: dh_t = D_t + c_{t+1}, c_t = a_t dh_t. So c is scanned with the elements (a_t, a_t D_t), latest row
// first. The state before a row is read from the forward pass's output of the row before, rotated back.

template <class C, class T, int V, int Half, class Size>
__global__ void __launch_bounds__(Size::threads, Size::blocks)
    scan_backward_kernel(C cell, scan_backward_args<T> p, scan_shape s, tile_elements elements, index_t tiles) {
  constexpr int R = Size::R, W = Size::W, N = 2 * V;
  constexpr bool recurrent = !IdentityCell<C>;
  using owned = owned_words<N, Size::threads>;
  __shared__ affine<float> part[2][W][N][column_lanes];
  const int lane_id = threadIdx.x % column_lanes, warp = threadIdx.x / column_lanes;
  const index_t index = elements.ticket != nullptr ? take_ticket(elements.ticket) : blockIdx.x;
  const index_t done = index / s.columns;  // tiles of this column before, in the order of work: the later ones
  const index_t tile = tiles - 1 - done, column = index - done * s.columns, column_word = column * owned::all;
  const scan_place at(s, column, lane_id, V);
  const scan_piece<Size> rows(p.spans, s, at, tile);
  const index_t t0 = rows.t0;
  const int used = rows.used, present = rows.present;
  const thread_rows<const T, V, Half> k(p.k, s, at, t0), v(p.v, s, at, t0), gate(p.gate, s, at, t0),
      k_out(p.k_out, s, at, t0), v_out(p.v_out, s, at, t0), dq_out(p.dq_out, s, at, t0), dk_out(p.dk_out, s, at, t0),
      dv_out(p.dv_out, s, at, t0);
  const thread_rows<T, V, Half> dq(p.dq, s, at, t0), dk(p.dk, s, at, t0), dv(p.dv, s, at, t0),
      dgate(p.dgate, s, at, t0);

  row_pair<T, V> dks[R], dvs[R], gs[R];
  dk_out.read(0, used, dks);
  dv_out.read(0, used, dvs);
  if constexpr (C::gated) gate.read(0, used, gs);
  const auto gate_of = [&](int r, int i) {
    if constexpr (C::gated)
      return lane(gs[r][i]);
    else
      return lane(0.0f);
  };
  const auto incoming = [&](int r, const auto& angles, auto& Dk, auto& Dv) {
    dks[r].widen(Dk);
    if (angles && dk_out) angles.template rotate<true>(Dk);
    dvs[r].widen(Dv);
  };

  if constexpr (recurrent) {
    affine<float> sum[2][N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[0][i] = sum[1][i] = affine<float>::identity();
    angle_cursor<V, Half> angles(p.rope, s, at, rows.position);
    auto k_row = k.row(0), v_row = v.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++k_row, ++v_row) {
      if (r >= used) break;
      float Dk[N], Dv[N], x[2][N] = {};
      incoming(r, angles, Dk, Dv);
      // Dead, and not read, where the cell's coefficient does not depend on its input.
      row_pair<T, V> row = {};
      if (dk_out) {
        k_row.read(row);
        row.widen(x[0]);
      }
      if (dv_out) {
        v_row.read(row);
        row.widen(x[1]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float ak = cell.element(lane(x[0][i]), gate_of(r, i), rows.position + r).a.x;
        const float av = cell.element(lane(x[1][i]), gate_of(r, i), rows.position + r).a.x;
        sum[0][i] = combine(affine<float>{ak, ak * Dk[i]}, sum[0][i]);
        sum[1][i] = combine(affine<float>{av, av * Dv[i]}, sum[1][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      part[0][warp][i][lane_id] = sum[0][i];
      part[1][warp][i][lane_id] = sum[1][i];
    }
  }

  row_pair<T, V> dqs[R];
  dq_out.read(0, used, dqs);
  const auto queries = [&] {
    angle_cursor<V, Half> angles(p.rope, s, at, rows.position);
    auto out = dq.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++out) {
      if (!dq_out || r >= used) break;
      float x[N];
      dqs[r].widen(x);
      if (angles) angles.template rotate<true>(x);
      out.write(x);
    }
  };

  if constexpr (recurrent) {
    affine<float> whole[owned::count];
    __syncthreads();
    owned::for_each([&](int o, int word, int chain, int i) {
      whole[o] = affine<float>::identity();
#pragma unroll
      for (int w = W - 1; w >= 0; --w) whole[o] = combine(whole[o], part[chain][w][i][lane_id]);
      if (done > 0 && tile > 0) elements.publish(done, column_word + word, whole[o]);
    });
    queries();
    owned::for_each([&](int o, int word, int chain, int i) {
      float carry = done == 0 ? read_state<V>(chain == 0 ? p.dk_last : p.dv_last, s, at, i)
                              : elements.look_back(done, column_word + word).b;
      const float first = whole[o](carry);
      if (tile > 0)
        elements.publish(done, column_word + word, {0.0f, first});
      else
        write_state<V>(chain == 0 ? p.dk_first : p.dv_first, s, at, i, first);
#pragma unroll
      for (int w = W - 1; w >= 0; --w) {
        affine<float>& e = part[chain][w][i][lane_id];
        const float next = e(carry);
        e.b = carry;  // what the rows after the warp's last one pass on to it
        carry = next;
      }
    });
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      dks[r].forget();
      dvs[r].forget();
      if constexpr (C::gated) gs[r].forget();
    }
    float carry[2][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      carry[0][i] = part[0][warp][i][lane_id].b;
      carry[1][i] = part[1][warp][i][lane_id].b;
    }
    constexpr int ahead = R < 4 ? R : 4;  // rows read at once
    static_assert(R % ahead == 0);
    angle_cursor<V, Half> angles(p.rope, s, at, rows.position + R - 1);
    auto dk_row = dk.row(R - 1), dv_row = dv.row(R - 1), dgate_row = dgate.row(R - 1);
#pragma unroll
    for (int r0 = R - ahead; r0 >= 0; r0 -= ahead) {
      row_pair<T, V> kr[ahead], vr[ahead], kb[ahead], vb[ahead];  // inputs, and outputs of the row before
      k.read(r0, used - r0, kr);
      v.read(r0, used - r0, vr);
      const int from = t0 + r0 == 0 ? 1 : 0;  // the state before row 0 is the initial one
      k_out.read(r0 - 1, used - r0, kb, from);
      v_out.read(r0 - 1, used - r0, vb, from);
#pragma unroll
      for (int j = ahead - 1; j >= 0; --j, --dk_row, --dv_row, --dgate_row) {
        const int r = r0 + j;
        const index_t t = t0 + r;
        if (r >= used) {
          --angles;
          continue;
        }
        float D[2][N], h[2][N], x[2][N], dg[N];
        incoming(r, angles, D[0], D[1]);
        --angles;
        kr[j].widen(x[0]);
        vr[j].widen(x[1]);
        kb[j].widen(h[0]);
        vb[j].widen(h[1]);
        if (t == 0) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            h[0][i] = read_state<V>(p.k_first, s, at, i);
            h[1][i] = read_state<V>(p.v_first, s, at, i);
          }
        } else if (angles && dk_out) {
          angles.template rotate<true>(h[0]);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const auto dk_i =
              cell.adjoint(lane(h[0][i]), lane(x[0][i]), gate_of(r, i), rows.position + r, lane(D[0][i] + carry[0][i]));
          const auto dv_i =
              cell.adjoint(lane(h[1][i]), lane(x[1][i]), gate_of(r, i), rows.position + r, lane(D[1][i] + carry[1][i]));
          carry[0][i] = dk_i.dstate.x;
          carry[1][i] = dv_i.dstate.x;
          x[0][i] = dk_i.dinput.x;
          x[1][i] = dv_i.dinput.x;
          dg[i] = dk_i.dgate.x + dv_i.dgate.x;
        }
        if (dk_out) dk_row.write(x[0]);
        if (dv_out) dv_row.write(x[1]);
        if constexpr (C::gated)
          if (dk_out || dv_out) dgate_row.write(dg);
      }
    }
  } else {
    queries();
    angle_cursor<V, Half> angles(p.rope, s, at, rows.position);
    auto dk_row = dk.row(0), dv_row = dv.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++dk_row, ++dv_row) {
      if (r >= used) break;
      float Dk[N], Dv[N];
      incoming(r, angles, Dk, Dv);
      if (t0 + r + 1 == rows.end)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          Dk[i] += read_state<V>(p.dk_last, s, at, i);
          Dv[i] += read_state<V>(p.dv_last, s, at, i);
        }
      if (dk_out) dk_row.write(Dk);
      if (dv_out) dv_row.write(Dv);
    }
    if (t0 == 0)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (dk_out) write_state<V>(p.dk_first, s, at, i, rows.end > 0 ? 0.0f : read_state<V>(p.dk_last, s, at, i));
        if (dv_out) write_state<V>(p.dv_first, s, at, i, rows.end > 0 ? 0.0f : read_state<V>(p.dv_last, s, at, i));
      }
  }
  const float zeros[N] = {};
  for (int r = used; r < present; ++r) {
    if (dq_out) dq.row(r).write(zeros);
    if (dk_out) dk.row(r).write(zeros);
    if (dv_out) dv.row(r).write(zeros);
    if constexpr (C::gated)
      if (dk_out || dv_out) dgate.row(r).write(zeros);
  }
}

template <class C, class T>
__global__ void __launch_bounds__(128) scan_backward_walk(C cell, scan_backward_args<T> p, scan_shape s) {
  constexpr int V = 1, N = 2;
  const index_t column = static_cast<index_t>(blockIdx.x) * 4 + threadIdx.x / column_lanes;
  const scan_place at(s, column, threadIdx.x % column_lanes, V);
  if (!at.active) return;
  const scan_rows rows(p.spans, at.b, s.T, true);
  const thread_rows<const T, V, 0> k(p.k, s, at, 0), v(p.v, s, at, 0), gate(p.gate, s, at, 0), k_out(p.k_out, s, at, 0),
      v_out(p.v_out, s, at, 0), dq_out(p.dq_out, s, at, 0), dk_out(p.dk_out, s, at, 0), dv_out(p.dv_out, s, at, 0);
  const thread_rows<T, V, 0> dq(p.dq, s, at, 0), dk(p.dk, s, at, 0), dv(p.dv, s, at, 0), dgate(p.dgate, s, at, 0);
  const float zeros[N] = {};
  for (index_t t = s.T - 1; t >= rows.used; --t) {
    if (dq_out) dq.row(t).write(zeros);
    if (dk_out) dk.row(t).write(zeros);
    if (dv_out) dv.row(t).write(zeros);
    if constexpr (C::gated)
      if (dk_out || dv_out) dgate.row(t).write(zeros);
  }
  lane kc[N], vc[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    kc[i] = read_state<V>(p.dk_last, s, at, i);
    vc[i] = read_state<V>(p.dv_last, s, at, i);
  }
  for (index_t t = rows.used - 1; t >= 0; --t) {
    const index_t position = rows.first + t;
    angle_cursor<V, 0> angles(p.rope, s, at, position);
    if (dq_out) {
      float x[N];
      row_pair<T, V> row = {};
      dq_out.row(t).read(row);
      row.widen(x);
      if (angles) angles.template rotate<true>(x);
      dq.row(t).write(x);
    }
    float g[N] = {}, dg[N] = {};
    row_pair<T, V> row = {};
    if (C::gated && gate) {
      gate.row(t).read(row);
      row.widen(g);
    }
    const auto back = [&](const auto& in, const auto& out, const auto& dout, const auto& din, const auto& first,
                          bool turn, auto& carry) {
      if (!dout) return;
      float D[N], x[N] = {}, h[N] = {};
      dout.row(t).read(row);
      row.widen(D);
      if (turn) angles.template rotate<true>(D);
      if constexpr (!IdentityCell<C>) {
        in.row(t).read(row);
        row.widen(x);
        if (t == 0) {
#pragma unroll
          for (int i = 0; i < N; ++i) h[i] = read_state<V>(first, s, at, i);
        } else {
          out.row(t - 1).read(row);
          row.widen(h);
          if (turn) angle_cursor<V, 0>(p.rope, s, at, position - 1).template rotate<true>(h);
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto d = cell.adjoint(lane(h[i]), lane(x[i]), lane(g[i]), position, lane(D[i]) + carry[i]);
        carry[i] = d.dstate;
        x[i] = d.dinput.x;
        dg[i] += d.dgate.x;
      }
      din.row(t).write(x);
    };
    back(k, k_out, dk_out, dk, p.k_first, static_cast<bool>(angles), kc);
    back(v, v_out, dv_out, dv, p.v_first, false, vc);
    if constexpr (C::gated)
      if (dk_out || dv_out) dgate.row(t).write(dg);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (dk_out) write_state<V>(p.dk_first, s, at, i, kc[i].x);
    if (dv_out) write_state<V>(p.dv_first, s, at, i, vc[i].x);
  }
}

/// Channels of either half that a thread takes, where heads and alignment allow.
inline constexpr int scan_width = 2;

// As many rows as shared memory (forward) and registers without spilling (backward) hold at two blocks of 256 threads a
// multiprocessor.
template <class T>
struct forward_tile : tile_size<16 / static_cast<int>(sizeof(T)), 8, 2> {};
template <class T>
struct backward_tile : tile_size<8 / static_cast<int>(sizeof(T)), 8, 2> {};

template <class C>
constexpr void require_device_cell() {
  static_assert(std::is_trivially_copyable_v<C>,
                "ratplus: a cell is copied to the device, so it must be trivially copyable");
}

template <class Size, int Half, class C, class T>
void scan_forward_tiles(context& ctx, const C& cell, const scan_forward_args<T>& p, const extents<4>& shape) {
  const scan_shape s(shape, scan_width);
  const index_t slots = static_cast<index_t>(ctx.multiprocessors()) * Size::blocks;
  const scan_plan plan(s, ceil_div(s.T, Size::rows), slots);
  const index_t tickets = plan.tickets();
  constexpr std::size_t staging = sizeof(row_pair<T, scan_width>) * 4 * Size::R * Size::threads;
  tile_elements elements;
  if (!IdentityCell<C> && !plan.whole)
    elements = make_elements(ctx, plan.tiles, s.columns, 4 * scan_width * column_lanes);
  launch(ctx, "scan", scan_forward_kernel<C, T, scan_width, Half, Size>,
         dim3(static_cast<unsigned>(tickets < slots ? tickets : slots)), dim3(Size::threads), staging, cell, p, s,
         elements, plan);
}

template <class Size, int Half, class C, class T>
void scan_backward_tiles(context& ctx, const C& cell, const scan_backward_args<T>& p, const extents<4>& shape) {
  const scan_shape s(shape, scan_width);
  const index_t tiles = ceil_div(s.T, Size::rows), blocks = tiles * s.columns;
  tile_elements elements;
  if (!IdentityCell<C> && tiles > 1) elements = make_elements(ctx, tiles, s.columns, 4 * scan_width * column_lanes);
  launch(ctx, "scan backward", scan_backward_kernel<C, T, scan_width, Half, Size>, dim3(static_cast<unsigned>(blocks)),
         dim3(Size::threads), 0, cell, p, s, elements, tiles);
}

/// Whether threads may take `scan_width` channels of either half at a time.
template <class... Views>
[[nodiscard]] bool pairs_are_wide(index_t d, const Views&... views) {
  return d % (2 * scan_width) == 0 && (aligned(views, scan_width) && ...);
}

}  // namespace detail

template <class C, class T>
void scan_forward_on(context& ctx, const C& cell, const scan_forward_args<T>& p) {
  detail::require_device_cell<C>();
  const extents<4> shape = (p.k ? p.k : p.v ? p.v : p.q).shape();
  if constexpr (AssociativeCell<C>)
    if (shape[2] > detail::walked_rows &&
        detail::pairs_are_wide(shape[3], p.q, p.k, p.v, p.gate, p.q_out, p.k_out, p.v_out, p.rope)) {
      if (shape[3] == 64) return detail::scan_forward_tiles<detail::forward_tile<T>, 32>(ctx, cell, p, shape);
      if (shape[3] == 128) return detail::scan_forward_tiles<detail::forward_tile<T>, 64>(ctx, cell, p, shape);
      return detail::scan_forward_tiles<detail::forward_tile<T>, 0>(ctx, cell, p, shape);
    }
  const detail::scan_shape s(shape, 1);
  detail::launch_overlapped(ctx, "scan", detail::scan_forward_walk<C, T>,
                            dim3(static_cast<unsigned>(detail::ceil_div(s.columns, 4))), dim3(128), cell, p, s);
}

template <class C, class T>
void scan_backward_on(context& ctx, const C& cell, const scan_backward_args<T>& p) {
  detail::require_device_cell<C>();
  const extents<4> shape = (p.dk_out ? p.dk_out : p.dv_out ? p.dv_out : p.dq_out).shape();
  if constexpr (AssociativeCell<C>)
    if (shape[2] > detail::walked_rows &&
        detail::pairs_are_wide(shape[3], p.k, p.v, p.gate, p.k_out, p.v_out, p.dq_out, p.dk_out, p.dv_out, p.rope, p.dq,
                               p.dk, p.dv, p.dgate)) {
      if (shape[3] == 64) return detail::scan_backward_tiles<detail::backward_tile<T>, 32>(ctx, cell, p, shape);
      if (shape[3] == 128) return detail::scan_backward_tiles<detail::backward_tile<T>, 64>(ctx, cell, p, shape);
      return detail::scan_backward_tiles<detail::backward_tile<T>, 0>(ctx, cell, p, shape);
    }
  const detail::scan_shape s(shape, 1);
  detail::launch(ctx, "scan backward", detail::scan_backward_walk<C, T>,
                 dim3(static_cast<unsigned>(detail::ceil_div(s.columns, 4))), dim3(128), 0, cell, p, s);
}

}  // namespace ratplus::cuda
