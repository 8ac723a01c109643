#pragma once
// Pieces of a prompt after a past, by the tiled kernel. A run of keys is then up to three ranges of rows: slots of the
// pool (the window's ring may wrap: two), and rows of this call. Those of a dilated run begin at another row in every
// sequence, which no tensor map can say, so they are gathered first: every D-th row of k and v. Everything the kernel
// reads thus lies in consecutive rows of three pairs of tensors.

#include "ratplus/backend/cuda/detail/attend_forward_sm90.cuh"
#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/pattern/tiles.hpp"

namespace ratplus::cuda::detail {

/// What the kernel's producers ask about the past.
struct past_rows {
  static constexpr int runs = 7;
  enum source { pool, fresh, gathered };  // numbers of the lattices

  view<const head_slots, 1> heads;  // (H)
  view<const token_t, 1> first;     // (B)
};

/// The part of a head's anchors that lies among the rows of this call, `used` from position `first` on.
template <class P>
[[nodiscard]] RATPLUS_HD key_run fresh_anchors(const P& pattern, index_t first, index_t used) {
  return clip(pattern.keys(first + used - 1)[1], first, first + used);
}

/// The seven ranges of each row: sinks, anchors and window before this call and in it, the ring of the window as two.
template <int Rows, class Heads>
__device__ void find_bounds(row_bounds<past_rows::runs, Rows>& rows, const Heads& heads, const lattices&,
                            const past_rows& past, const tile_place& at, int row) {
  using source = past_rows::source;
  const int t0 = at.number * Rows, used = at.used;
  const index_t first = past.first[at.b], query = first + max(min(t0 + row, used - 1), 0);
  const head_slots& head = past.heads[at.h];
  const residency& where = head.where;
  key_runs keys;
  index_t first_gathered = first;
  bool own = false;
  heads.visit(at.h, [&](const auto& pattern) {
    keys = pattern.keys(query);
    own = sees_own_key_alone(pattern);
    if (used > 0) first_gathered = fresh_anchors(pattern, first, used).begin;
  });
  const auto set = [&](int run, source from, index_t begin, index_t end) {
    if (row == 0) rows.lattice[run] = from;
    if (end < begin) end = begin;
    rows.at[run][row] = t0 < used ? lattice_range{static_cast<int>(begin), static_cast<int>(end)} : lattice_range{0, 0};
  };
  const auto old = [&](int r) { return clip(keys[r], 0, first); };
  const auto now = [&](int r) { return clip(keys[r], first, query + 1); };

  const bool all_kept = where.kept().dense();
  // Without sinks at 0, where a tile that sees nothing takes its step: all of its values are then beyond the run's end.
  const index_t sinks = old(0).empty() ? 0 : head.offset + (all_kept ? where.first_anchor_slot() : 0);
  set(0, source::pool, sinks + old(0).begin, sinks + old(0).end);
  set(1, source::fresh, now(0).begin - first, now(0).end - first);

  const key_run anchors = now(1);
  const index_t D = anchors.step, pooled = head.offset + where.first_anchor_slot();
  set(2, source::pool, pooled + old(1).begin / D, pooled + old(1).begin / D + old(1).count());
  if (D == 1)
    set(3, source::fresh, anchors.begin - first, anchors.end - first);
  else
    set(3, source::gathered, 0, (anchors.end - first_gathered + D - 1) / D);

  // A window that has left the past stays at its end: ranges of rows that see nothing must not reach beyond it.
  // Positions of the ring from `turn` on lie at its beginning.
  const index_t begin = old(2).empty() ? first : old(2).begin, end = first;
  const index_t slots = where.window_slots(), turn = slots > 0 ? first / slots * slots : 0;
  const index_t ring = head.offset + where.first_ring_slot();
  if (all_kept) {
    set(4, source::pool, pooled + begin, pooled + end);
    set(5, source::pool, 0, 0);
  } else {
    const index_t lap = ring + slots - turn;
    set(4, source::pool, lap + (begin < turn ? begin : turn), lap + turn);
    set(5, source::pool, ring + (begin > turn ? begin : turn) - turn, ring + end - turn);
  }
  set(6, source::fresh, now(2).begin - first, now(2).end - first);
  if (row == 0) rows.sinks = 0;
  set_own(rows, own, !now(2).empty(), t0 + row, used, row);
}

/// Copies the rows of this call that are anchors of their head, of k and v (B, H, T, d), to the same of (B, H, n, d).
template <class Heads>
__global__ void __launch_bounds__(row_threads)
    gather_anchors(const Heads heads, view<const bfloat16, 4> k, view<const bfloat16, 4> v, view<bfloat16, 4> k_to,
                   view<bfloat16, 4> v_to, sequence_spans spans) {
  constexpr int V = widest<bfloat16>;
  const index_t H = k.extent(1), n = k_to.extent(2), d = k.extent(3);
  const index_t row = (static_cast<index_t>(blockIdx.x) * row_threads + threadIdx.x) / 32;
  if (row >= k.extent(0) * H * n) return;
  const index_t j = row % n, h = row / n % H, b = row / n / H;
  const index_t first = spans.first[b], used = spans.length ? spans.length[b] : k.extent(2);
  if (used == 0) return;
  key_run anchors;
  heads.visit(h, [&](const auto& pattern) { anchors = fresh_anchors(pattern, first, used); });
  if (anchors.step == 1 || j >= anchors.count()) return;
  const index_t t = anchors[j] - first;
  for (index_t c = static_cast<index_t>(threadIdx.x % 32) * V; c < d; c += 32 * V) {
    *reinterpret_cast<packed<bfloat16, V>*>(k_to.row(b, h, j) + c) = load<bfloat16, V>(k.row(b, h, t) + c);
    *reinterpret_cast<packed<bfloat16, V>*>(v_to.row(b, h, j) + c) = load<bfloat16, V>(v.row(b, h, t) + c);
  }
}

/// Whether the slots of every run of `asked` are consecutive in a cache kept under `kept`.
[[nodiscard]] constexpr bool slots_in_order(const any_sparse& kept, const any_sparse& asked) {
  return !asked.anchored() || asked.dense() || (!kept.dense() && asked.dilation() == kept.dilation());
}

/// Whether this kernel can serve a call with a past: sparse patterns whose keys the cache keeps in order.
template <class P>
[[nodiscard]] bool past_in_order(const P& pattern, index_t H, const head_slots* heads) {
  if (heads == nullptr) return false;
  bool all = true;
  for (index_t h = 0; h < H; ++h)
    visit_head(pattern, h, H, [&](const auto& p) {
      if constexpr (SparsePattern<std::decay_t<decltype(p)>>)
        all = all && slots_in_order(heads[h].where.kept(), any_sparse(p));
      else
        all = false;
    });
  return all;
}

/// A pool (B, slots, d) as the rows of one head.
[[nodiscard]] inline view<const bfloat16, 4> one_head(const view<const bfloat16, 3>& pool) {
  return {pool.data(), {{pool.extent(0), 1, pool.extent(1), pool.extent(2)}}, {{pool.stride(0), 0, pool.stride(1), 1}}};
}

/// The patterns of a call by heads, all of them sparse: one instantiation for a uniform call, one for groups.
template <class Heads>
inline constexpr bool sparse_on_device =
    std::is_same_v<Heads, uniform_heads<any_sparse>> || std::is_same_v<Heads, sparse_heads>;

template <class P, class Args>
void attend_past_tiles(context& ctx, const P& pattern, const Args& p, const view<const float, 3>& scores) {
  const index_t B = p.q.extent(0), H = p.q.extent(1), T = p.q.extent(2), d = p.q.extent(3);
  const auto heads = on_device(pattern, H);
  if constexpr (sparse_on_device<std::remove_const_t<decltype(heads)>>) {
    const auto maps = [](const view<const bfloat16, 4>& k, const view<const bfloat16, 4>& v, bool pooled) {
      return lattice{{hopper::tensor_map(rows_of(k), forward_step), {}},
                     {hopper::tensor_map(rows_of(v), forward_step), {}},
                     0,
                     1,
                     pooled};
    };
    lattices keys;
    keys.at[past_rows::pool] = maps(one_head(p.past.k), one_head(p.past.v), true);
    keys.at[past_rows::fresh] = keys.at[past_rows::gathered] = maps(p.k, p.v, false);
    keys.count = 3;
    index_t n = 0;  // gathered rows of a head
    for (index_t h = 0; h < H; ++h)
      visit_head(pattern, h, H, [&](const auto& each) {
        const index_t step = each.keys(0)[1].step;
        if (step > 1) n = std::max(n, ceil_div(T, step));
      });
    if (n > 0) {
      auto* const rows = static_cast<bfloat16*>(ctx.scratch(static_cast<std::size_t>(2 * B * H * n * d) * 2));
      const view<bfloat16, 4> k(rows, {{B, H, n, d}}), v(rows + B * H * n * d, {{B, H, n, d}});
      launch(ctx, "attend", gather_anchors<std::remove_const_t<decltype(heads)>>,
             static_cast<unsigned>(ceil_div(B * H * n, row_threads / 32)), row_threads, 0, heads, p.k, p.v, k, v,
             p.spans);
      keys.at[past_rows::gathered] = maps(k, v, false);
    }
    launch_forward_tiles(ctx, heads, keys, past_rows{p.past.heads, p.spans.first}, p, scores);
  }
}

}  // namespace ratplus::cuda::detail
