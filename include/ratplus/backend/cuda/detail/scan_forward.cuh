#pragma once
// The scan's forward kernels: in tiles for an AssociativeCell, row after row for any other.

#include "ratplus/backend/cuda/detail/heads.cuh"
#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/scan.hpp"
#include "ratplus/pattern/residency.hpp"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::cuda::detail {

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

/// Every key is written.
struct all_keys {
  static constexpr bool scored = false;
};

/// Each query's product with its own key is written, and of the keys those that a later query sees.
struct seen_keys {
  static constexpr bool scored = true;

  view<float, 3> scores;             // (B, H, T)
  sparse_heads patterns;             // without a past
  view<const head_slots, 1> kept{};  // (H), with one: whatever it keeps may be asked for

  /// Bit r of a lane's result, r < Lanes: whether a later query sees the key at position + r. Groups of Lanes
  /// neighbouring lanes, those of one head, find it together.
  template <int Lanes>
  [[nodiscard]] __device__ unsigned later(index_t h, index_t position) const {
    const int lane = static_cast<int>(threadIdx.x) % column_lanes;
    const index_t key = position + lane % Lanes;
    bool seen = false;
    const auto look = [&](const auto& pattern) { seen = pattern.last_query(key, key + 2) > key; };
    if (kept)
      look(kept[h].where.kept());
    else
      patterns.visit(h, look);
    return __ballot_sync(~0u, seen) >> (lane - lane % Lanes);
  }
};

// Blocks stay and take one tile after another. A tile's rows are read into shared memory, by the thread that uses them:
// whatever row has been used for the last time gives its place to the same row of the next tile, so reading never
// pauses, and nothing of it is held in registers but the angles, which the columns of a batch share. Rows are used
// twice (keys, values, gates: once for the tile's element, once for the states), queries once.

template <class C, class T, int V, int Half, class Size, class Keys>
__global__ void __launch_bounds__(Size::threads, Size::blocks)
    scan_forward_kernel(C cell, scan_forward_args<T> p, scan_shape s, tile_elements elements, scan_plan plan,
                        Keys wanted) {
  constexpr int R = Size::R, W = Size::W, N = 2 * V, threads = Size::threads;
  constexpr bool recurrent = !IdentityCell<C>;
  constexpr std::integral_constant<int, Half / V> units;  // of a head
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
    const scan_place at(s, now.column, lane_id, V, units);
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
    const scan_place at(s, now.column, lane_id, V, units);
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
    const scan_place next_at(s, more ? after.column : 0, lane_id, V, units);
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

    // While the tiles before finish: the queries, which wait for nobody, unless they are multiplied with their keys.
    if constexpr (!Keys::scored)
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
    std::conditional_t<Keys::scored, lane_sums<Half / V, R>, Keys> scores;  // a head's lanes lie side by side
    unsigned later = 0;
    if constexpr (Keys::scored) later = wanted.template later<Half / V>(at.h, rows.position);
    with_or_without_branches([&](auto all) {
      const thread_rows<T, V, Half> k_out(p.k_out, s, at, rows.t0);
      // Beside values every row writes its key; or, where few do, its query, whose place the next one then takes.
      auto k_or_q = [&] {
        if constexpr (Keys::scored)
          return both_rows{thread_rows<T, V, Half>(p.q_out, s, at, rows.t0).row(0),
                           thread_rows<const T, V, Half>(p.q, s, next_at, next_rows.t0).row(0)};
        else
          return k_out.row(0);
      }();
      auto v_row = thread_rows<T, V, Half>(p.v_out, s, at, rows.t0).row(0);
      auto k_in = thread_rows<const T, V, Half>(p.k, s, next_at, next_rows.t0).row(0);
      auto v_in = thread_rows<const T, V, Half>(p.v, s, next_at, next_rows.t0).row(0);
      auto g_in = thread_rows<const T, V, Half>(p.gate, s, next_at, next_rows.t0).row(0);
      inputs ahead = read_row(0);
#pragma unroll
      for (int r = 0; r < R; ++r, ++k_or_q, ++v_row, ++k_in, ++v_in, ++g_in) {
        const inputs in = ahead;
        [[maybe_unused]] float score = 0;
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
          if constexpr (Keys::scored) {
            // Query and key before rotation: it turns both alike.
            float q[N];
            slot_of(queries, r).copy().widen(q);
#pragma unroll
            for (int i = 0; i < N; ++i) score += q[i] * state[0][i];
            if (all || p.rope) angles[r].template rotate<false>(q);
            k_or_q.out.write(q);
          }
          if ((all || p.k) && (!Keys::scored || __builtin_expect(later >> r & 1, 0))) {
            float x[N];
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = state[0][i];
            if (all || p.rope) angles[r].template rotate<false>(x);
            if constexpr (Keys::scored)
              k_out.row(r).write(x);
            else
              k_or_q.write(x);
          }
        }
        if (all || r < next_used) {
          if (all || p.k) k_in.fetch(slot_of(keys, r));
          if (all || p.v) v_in.fetch(slot_of(values, r));
          if constexpr (C::gated) g_in.fetch(slot_of(gates, r));
          if constexpr (Keys::scored) k_or_q.in.fetch(slot_of(queries, r));
        }
        if constexpr (Keys::scored) scores.add(r, score);
      }
    });
    if constexpr (Keys::scored)
      scores.write([&](int r, float score) {
        if (r < used) wanted.scores(at.b, at.h, rows.t0 + r) = score;
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

}  // namespace ratplus::cuda::detail
