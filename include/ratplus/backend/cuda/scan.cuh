#pragma once
// The recurrence over keys and values with RoPE: one pass over memory. An AssociativeCell is scanned in tiles
// (detail/scan_tiles.cuh), so that a single long sequence uses the whole card; any other cell, and a call of a few
// rows, walks its rows in order, one thread for each pair of channel groups.

#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cuda {

namespace detail {

/// Rows of a thread, warps of a column, columns of a block, blocks of a multiprocessor.
template <int R_, int W_, int G_, int Blocks>
struct tile_size {
  static constexpr int R = R_, W = W_, G = G_, blocks = Blocks;
  static constexpr int threads = column_lanes * W * G, rows = R * W;
};

/// Calls up to this long are walked: a tile would be mostly empty.
inline constexpr index_t walked_rows = 16;

/// Rows of sequence b in use, and the position of its row 0.
struct scan_rows {
  index_t used, first;
  __device__ scan_rows(const sequence_spans& spans, index_t b, index_t T, bool active)
      : used(active && spans.length ? spans.length[b] : T), first(active && spans.first ? spans.first[b] : 0) {}
};

template <class C, class T, int V, int Half, class Size>
__global__ void __launch_bounds__(Size::threads, Size::blocks)
    scan_forward_kernel(C cell, scan_forward_args<T> p, scan_shape s, tile_elements elements, index_t tiles) {
  constexpr int R = Size::R, W = Size::W, G = Size::G, N = 2 * V;
  constexpr bool recurrent = !IdentityCell<C>;
  __shared__ affine<float> part[recurrent ? G : 1][2][W][N][column_lanes];
  const int lane_id = threadIdx.x % column_lanes, warp = threadIdx.x / column_lanes % W;
  const int group = threadIdx.x / (column_lanes * W);
  const index_t column_blocks = ceil_div(s.columns, G);
  const index_t index = elements.ticket != nullptr ? take_ticket(elements.ticket) : blockIdx.x;
  const index_t tile = index / column_blocks, column = (index - tile * column_blocks) * G + group;
  const scan_place at(s, column, lane_id, V);
  const scan_rows rows(p.spans, at.b, s.T, at.active);
  const index_t t0 = tile * Size::rows + warp * R;
  const auto within = [&](index_t end) { return static_cast<int>(end - t0 < 0 ? 0 : end - t0 < R ? end - t0 : R); };
  const int used = at.active ? within(rows.used) : 0, present = at.active ? within(s.T) : 0;
  const thread_rows<const T, V, Half> k(p.k, s, at, t0), v(p.v, s, at, t0), gate(p.gate, s, at, t0), q(p.q, s, at, t0);
  const thread_rows<T, V, Half> k_out(p.k_out, s, at, t0), v_out(p.v_out, s, at, t0), q_out(p.q_out, s, at, t0);

  row_pair<T, V> ks[R], vs[R], gs[R];
  k.read(0, used, ks);
  v.read(0, used, vs);
  if constexpr (C::gated) gate.read(0, used, gs);

  // The map of row r on channel i of either stream.
  const auto element = [&](const row_pair<T, V>& x, int r, int i) {
    const affine<lane> e = cell.element(lane(x[i]), lane(C::gated ? gs[r][i] : 0.0f), rows.first + t0 + r);
    return affine<float>{e.a.x, e.b.x};
  };

  if constexpr (recurrent) {
    affine<float> sum[2][N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[0][i] = sum[1][i] = affine<float>::identity();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= used) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[0][i] = combine(sum[0][i], element(ks[r], r, i));
        sum[1][i] = combine(sum[1][i], element(vs[r], r, i));
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      part[group][0][warp][i][lane_id] = sum[0][i];
      part[group][1][warp][i][lane_id] = sum[1][i];
    }
  }

  row_pair<T, V> qs[R];
  q.read(0, used, qs);

  if constexpr (recurrent) {
    // From here on a thread owns words `word` of its column: the chains of single channels.
    constexpr int words = 2 * N * column_lanes, threads = W * column_lanes;
    static_assert(words % threads == 0 || threads % words == 0);
    constexpr int owned = words > threads ? words / threads : 1;
    affine<float> whole[owned];
    __syncthreads();
#pragma unroll
    for (int o = 0; o < owned; ++o) {
      const int word = o * threads + warp * column_lanes + lane_id;
      if (word >= words || column >= s.columns) break;
      const int chain = word / (N * column_lanes), i = word / column_lanes % N;
      whole[o] = affine<float>::identity();
#pragma unroll
      for (int w = 0; w < W; ++w) whole[o] = combine(whole[o], part[group][chain][w][i][lane_id]);
      if (tile > 0 && tile + 1 < tiles)
        tile_elements::publish(elements.words + tile * elements.stride + column * words + word, whole[o]);
    }
    // While the tiles before finish: the queries, which wait for nobody.
    {
      angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
      auto out = q_out.row(0);
#pragma unroll
      for (int r = 0; r < R; ++r, ++angles, ++out) {
        if (!q || r >= used) break;
        float x[N];
        qs[r].widen(x);
        if (angles) angles.template rotate<false>(x);
        out.write(x);
      }
    }
#pragma unroll
    for (int o = 0; o < owned; ++o) {
      const int word = o * threads + warp * column_lanes + lane_id;
      if (word >= words || column >= s.columns) break;
      const int chain = word / (N * column_lanes), i = word / column_lanes % N;
      const index_t slot = column * words + word;
      float state =
          tile == 0 ? read_state<V>(chain == 0 ? p.k_first : p.v_first, s, at, i) : elements.look_back(tile, slot).b;
      const float last = whole[o](state);
      if (tile + 1 < tiles) {
        tile_elements::publish(elements.words + tile * elements.stride + slot, {0.0f, last});
      } else {
        // The last state may lie where the first one was read.
        if (tile > 0) elements.wait_for_first(slot);
        write_state<V>(chain == 0 ? p.k_last : p.v_last, s, at, i, last);
      }
#pragma unroll
      for (int w = 0; w < W; ++w) {
        affine<float>& e = part[group][chain][w][i][lane_id];
        const float next = e(state);
        e.b = state;  // before the warp's first row
        state = next;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      ks[r].forget();
      vs[r].forget();
      if constexpr (C::gated) gs[r].forget();
    }
    float state[2][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      state[0][i] = part[group][0][warp][i][lane_id].b;
      state[1][i] = part[group][1][warp][i][lane_id].b;
    }
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
    auto k_row = k_out.row(0), v_row = v_out.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++k_row, ++v_row) {
      if (r >= used) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        state[0][i] = element(ks[r], r, i)(state[0][i]);
        state[1][i] = element(vs[r], r, i)(state[1][i]);
      }
      if (v) v_row.write(state[1]);
      if (k) {
        float x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = state[0][i];
        if (angles) angles.template rotate<false>(x);
        k_row.write(x);
      }
    }
  } else {
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
    auto q_row = q_out.row(0), k_row = k_out.row(0), v_row = v_out.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++q_row, ++k_row, ++v_row) {
      if (r >= used) break;
      const auto pass = [&](const row_pair<T, V>& x, const auto& out, bool turn, const view<float, 3>& last) {
        float y[N];
        x.widen(y);
        if (t0 + r + 1 == rows.used)
          for (int i = 0; i < N; ++i) write_state<V>(last, s, at, i, y[i]);
        if (turn) angles.template rotate<false>(y);
        out.write(y);
      };
      if (q) pass(qs[r], q_row, static_cast<bool>(angles), {});
      if (k) pass(ks[r], k_row, static_cast<bool>(angles), p.k_last);
      if (v) pass(vs[r], v_row, false, p.v_last);
    }
    if (rows.used == 0 && t0 == 0)
      for (int i = 0; i < N; ++i) {
        if (k) write_state<V>(p.k_last, s, at, i, read_state<V>(p.k_first, s, at, i));
        if (v) write_state<V>(p.v_last, s, at, i, read_state<V>(p.v_first, s, at, i));
      }
  }
  const float zeros[N] = {};
  for (int r = used; r < present; ++r) {
    if (q) q_out.row(r).write(zeros);
    if (k) k_out.row(r).write(zeros);
    if (v) v_out.row(r).write(zeros);
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
  constexpr int R = Size::R, W = Size::W, G = Size::G, N = 2 * V;
  constexpr bool recurrent = !IdentityCell<C>;
  __shared__ affine<float> part[recurrent ? G : 1][2][W][N][column_lanes];
  const int lane_id = threadIdx.x % column_lanes, warp = threadIdx.x / column_lanes % W;
  const int group = threadIdx.x / (column_lanes * W);
  const index_t column_blocks = ceil_div(s.columns, G);
  const index_t index = elements.ticket != nullptr ? take_ticket(elements.ticket) : blockIdx.x;
  const index_t done = index / column_blocks;  // tiles of this column before, in the order of work: the later ones
  const index_t tile = tiles - 1 - done, column = (index - done * column_blocks) * G + group;
  const scan_place at(s, column, lane_id, V);
  const scan_rows rows(p.spans, at.b, s.T, at.active);
  const index_t t0 = tile * Size::rows + warp * R;
  const auto within = [&](index_t end) { return static_cast<int>(end - t0 < 0 ? 0 : end - t0 < R ? end - t0 : R); };
  const int used = at.active ? within(rows.used) : 0, present = at.active ? within(s.T) : 0;
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
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
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
        const float ak = cell.element(lane(x[0][i]), gate_of(r, i), rows.first + t0 + r).a.x;
        const float av = cell.element(lane(x[1][i]), gate_of(r, i), rows.first + t0 + r).a.x;
        sum[0][i] = combine(affine<float>{ak, ak * Dk[i]}, sum[0][i]);
        sum[1][i] = combine(affine<float>{av, av * Dv[i]}, sum[1][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      part[group][0][warp][i][lane_id] = sum[0][i];
      part[group][1][warp][i][lane_id] = sum[1][i];
    }
  }

  row_pair<T, V> dqs[R];
  dq_out.read(0, used, dqs);
  const auto queries = [&] {
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
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
    constexpr int words = 2 * N * column_lanes, threads = W * column_lanes;
    static_assert(words % threads == 0 || threads % words == 0);
    constexpr int owned = words > threads ? words / threads : 1;
    affine<float> whole[owned];
    __syncthreads();
#pragma unroll
    for (int o = 0; o < owned; ++o) {
      const int word = o * threads + warp * column_lanes + lane_id;
      if (word >= words || column >= s.columns) break;
      const int chain = word / (N * column_lanes), i = word / column_lanes % N;
      whole[o] = affine<float>::identity();
#pragma unroll
      for (int w = W - 1; w >= 0; --w) whole[o] = combine(whole[o], part[group][chain][w][i][lane_id]);
      if (done > 0 && tile > 0)
        tile_elements::publish(elements.words + done * elements.stride + column * words + word, whole[o]);
    }
    queries();
#pragma unroll
    for (int o = 0; o < owned; ++o) {
      const int word = o * threads + warp * column_lanes + lane_id;
      if (word >= words || column >= s.columns) break;
      const int chain = word / (N * column_lanes), i = word / column_lanes % N;
      const index_t slot = column * words + word;
      float carry =
          done == 0 ? read_state<V>(chain == 0 ? p.dk_last : p.dv_last, s, at, i) : elements.look_back(done, slot).b;
      const float first = whole[o](carry);
      if (tile > 0)
        tile_elements::publish(elements.words + done * elements.stride + slot, {0.0f, first});
      else
        write_state<V>(chain == 0 ? p.dk_first : p.dv_first, s, at, i, first);
#pragma unroll
      for (int w = W - 1; w >= 0; --w) {
        affine<float>& e = part[group][chain][w][i][lane_id];
        const float next = e(carry);
        e.b = carry;  // what the rows after the warp's last one pass on to it
        carry = next;
      }
    }
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
      carry[0][i] = part[group][0][warp][i][lane_id].b;
      carry[1][i] = part[group][1][warp][i][lane_id].b;
    }
    constexpr int ahead = R < 4 ? R : 4;  // rows read at once
    static_assert(R % ahead == 0);
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0 + R - 1);
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
              cell.adjoint(lane(h[0][i]), lane(x[0][i]), gate_of(r, i), rows.first + t, lane(D[0][i] + carry[0][i]));
          const auto dv_i =
              cell.adjoint(lane(h[1][i]), lane(x[1][i]), gate_of(r, i), rows.first + t, lane(D[1][i] + carry[1][i]));
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
    angle_cursor<V, Half> angles(p.rope, s, at, rows.first + t0);
    auto dk_row = dk.row(0), dv_row = dv.row(0);
#pragma unroll
    for (int r = 0; r < R; ++r, ++angles, ++dk_row, ++dv_row) {
      if (r >= used) break;
      float Dk[N], Dv[N];
      incoming(r, angles, Dk, Dv);
      if (t0 + r + 1 == rows.used)
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
        if (dk_out) write_state<V>(p.dk_first, s, at, i, rows.used > 0 ? 0.0f : read_state<V>(p.dk_last, s, at, i));
        if (dv_out) write_state<V>(p.dv_first, s, at, i, rows.used > 0 ? 0.0f : read_state<V>(p.dv_last, s, at, i));
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

// As many rows as registers hold without spilling at two blocks of 256 threads a multiprocessor.
template <class T>
struct forward_tile : tile_size<16 / static_cast<int>(sizeof(T)), 8, 1, 2> {};
template <class T>
struct backward_tile : tile_size<8 / static_cast<int>(sizeof(T)), 8, 1, 2> {};

template <class C>
constexpr void require_device_cell() {
  static_assert(std::is_trivially_copyable_v<C>,
                "ratplus: a cell is copied to the device, so it must be trivially copyable");
}

template <class Size, int Half, class C, class T>
void scan_forward_tiles(context& ctx, const C& cell, const scan_forward_args<T>& p, const extents<4>& shape) {
  const scan_shape s(shape, scan_width);
  const index_t tiles = ceil_div(s.T, Size::rows), blocks = tiles * ceil_div(s.columns, Size::G);
  tile_elements elements;
  if (!IdentityCell<C> && tiles > 1) elements = make_elements(ctx, tiles, s.columns, 4 * scan_width * column_lanes);
  launch(ctx, "scan", scan_forward_kernel<C, T, scan_width, Half, Size>, dim3(static_cast<unsigned>(blocks)),
         dim3(Size::threads), 0, cell, p, s, elements, tiles);
}

template <class Size, int Half, class C, class T>
void scan_backward_tiles(context& ctx, const C& cell, const scan_backward_args<T>& p, const extents<4>& shape) {
  const scan_shape s(shape, scan_width);
  const index_t tiles = ceil_div(s.T, Size::rows), blocks = tiles * ceil_div(s.columns, Size::G);
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
