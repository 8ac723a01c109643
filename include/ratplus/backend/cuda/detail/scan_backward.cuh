#pragma once
// The scan's backward kernels: in tiles for an AssociativeCell, row after row for any other.
//
// Backwards, with D_t the gradient of state t from outside (dk_out rotated back, dv_out) and c_t what step t passes on
// to state t − 1: dh_t = D_t + c_{t+1}, c_t = a_t dh_t. So c is scanned with the elements (a_t, a_t D_t), latest row
// first. The state before a row is read from the forward pass's output of the row before, rotated back.

#include "ratplus/backend/cuda/detail/scan_tiles.cuh"
#include "ratplus/ops/scan.hpp"

namespace ratplus::cuda::detail {

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

}  // namespace ratplus::cuda::detail
