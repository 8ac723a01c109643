#pragma once
// The recurrence over keys and values with RoPE: one pass over memory. An AssociativeCell is scanned in tiles
// (detail/scan_tiles.cuh), so that a single long sequence uses the whole card, or forward, where many heads do so, a
// warp for each (detail/scan_columns.cuh); any other cell, and a call of a few rows, walks its rows in order, one
// thread for each pair of channel groups.

#include "ratplus/backend/cuda/detail/scan_backward.cuh"
#include "ratplus/backend/cuda/detail/scan_columns.cuh"
#include "ratplus/backend/cuda/detail/scan_forward.cuh"

namespace ratplus::cuda {

namespace detail {

/// Calls up to this long are walked: a tile would be mostly empty.
inline constexpr index_t walked_rows = 16;

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

template <class Size, int Half, class C, class T, class Keys>
void scan_forward_tiles(context& ctx, const C& cell, const scan_forward_args<T>& p, const extents<4>& shape,
                        const Keys& wanted) {
  const scan_shape s(shape, scan_width);
  const index_t slots = static_cast<index_t>(ctx.multiprocessors()) * Size::blocks;
  const scan_plan plan(s, ceil_div(s.T, Size::rows), slots);
  const index_t tickets = plan.tickets();
  constexpr std::size_t staging = sizeof(row_pair<T, scan_width>) * 4 * Size::R * Size::threads;
  tile_elements elements;
  if (!IdentityCell<C> && !plan.whole)
    elements = make_elements(ctx, plan.tiles, s.columns, 4 * scan_width * column_lanes);
  launch(ctx, "scan", scan_forward_kernel<C, T, scan_width, Half, Size, Keys>,
         dim3(static_cast<unsigned>(tickets < slots ? tickets : slots)), dim3(Size::threads), staging, cell, p, s,
         elements, plan, wanted);
}

/// An AssociativeCell over rows that `scans_in_tiles` accepts, of heads of 2 · Half channels (0: of any). `wanted`:
/// all_keys or seen_keys.
template <int Half, class C, class T, class Keys = all_keys>
void scan_forward_wide(context& ctx, const C& cell, const scan_forward_args<T>& p, const extents<4>& shape,
                       const Keys& wanted = {}) {
  if constexpr (Half > 0 && std::is_same_v<T, bfloat16>) {
    const scan_shape s(shape, scan_width);
    constexpr int chunk = widest<T>;
    if (p.q && p.k && p.v && p.rope && columns_suffice(s.columns, ctx.multiprocessors()) && aligned(p.q, chunk) &&
        aligned(p.k, chunk) && aligned(p.v, chunk) && aligned(p.gate, chunk))
      return launch(ctx, "scan", scan_forward_columns<C, Half, Keys>,
                    dim3(static_cast<unsigned>(ceil_div(s.columns, column_walk::warps))),
                    dim3(column_lanes * column_walk::warps), column_walk::warps * column_walk::ring, cell, p, s,
                    wanted);
  }
  scan_forward_tiles<forward_tile<T>, Half>(ctx, cell, p, shape, wanted);
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

template <class C, class T>
[[nodiscard]] bool scans_in_tiles(const scan_forward_args<T>& p) {
  const extents<4> shape = (p.k ? p.k : p.v ? p.v : p.q).shape();
  return AssociativeCell<C> && shape[2] > walked_rows &&
         pairs_are_wide(shape[3], p.q, p.k, p.v, p.gate, p.q_out, p.k_out, p.v_out, p.rope);
}

}  // namespace detail

template <class C, class T>
void scan_forward_on(context& ctx, const C& cell, const scan_forward_args<T>& p) {
  detail::require_device_cell<C>();
  const extents<4> shape = (p.k ? p.k : p.v ? p.v : p.q).shape();
  if constexpr (AssociativeCell<C>)
    if (detail::scans_in_tiles<C>(p)) {
      if (shape[3] == 64) return detail::scan_forward_wide<32>(ctx, cell, p, shape);
      if (shape[3] == 128) return detail::scan_forward_wide<64>(ctx, cell, p, shape);
      return detail::scan_forward_wide<0>(ctx, cell, p, shape);
    }
  const detail::scan_shape s(shape, 1);
  detail::launch_overlapped(ctx, "scan", detail::scan_forward_walk<C, T>,
                            dim3(static_cast<unsigned>(detail::ceil_div(s.columns, 4))), dim3(128), 0, cell, p, s);
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
