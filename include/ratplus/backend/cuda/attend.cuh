#pragma once
// Attention on CUDA. Tiles on the tensor cores of Hopper for bfloat16 heads of up to 128 channels that the copy engine
// can address, after a past too (detail/attend_past.cuh); short pieces after a past, by splitting the keys
// (detail/decode.cuh); everything else by rows.

#include "ratplus/backend/cuda/detail/attend_backward_sm90.cuh"
#include "ratplus/backend/cuda/detail/attend_past.cuh"
#include "ratplus/backend/cuda/detail/attend_rows.cuh"
#include "ratplus/backend/cuda/detail/decode.cuh"

namespace ratplus::cuda {

namespace detail {

/// Whether the tiled kernels run here and can address these views.
template <class... Views>
[[nodiscard]] bool tileable(const context& ctx, index_t d, const Views&... views) {
  static const bool compiled = hopper::compiled(attend_forward_sm90<128, uniform_heads<any_sparse>, no_past>);
  return compiled && ctx.properties().major == 9 && d <= 128 && (hopper::addressable(rows_of(views)) && ...);
}

template <class T, class KV>
[[nodiscard]] bool is_decoded(const attend_forward_args<T, KV>& p) {
  return p.past && p.q.extent(2) <= decoded_rows;
}

/// Whether the tiled kernel serves this call.
template <class P, class T, class KV>
[[nodiscard]] bool attends_in_tiles(const context& ctx, const P& pattern, const attend_forward_args<T, KV>& p) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (is_decoded(p) || !tileable(ctx, p.q.extent(3), p.q, p.k, p.v, p.out)) return false;
    if (!p.past) return true;
    if constexpr (std::is_same_v<KV, bfloat16>)
      return past_in_order(pattern, p.q.extent(1), p.past.heads_here) &&
             hopper::addressable(rows_of(one_head(p.past.k))) && hopper::addressable(rows_of(one_head(p.past.v)));
  }
  return false;
}

/// `scores`: forward_job.
template <class P, class T, class KV>
void attend_in_tiles(context& ctx, const P& pattern, const attend_forward_args<T, KV>& p,
                     const view<const float, 3>& scores = {}) {
  if (!p.past) return attend_forward_tiles(ctx, pattern, p, scores);
  if constexpr (std::is_same_v<KV, bfloat16>) attend_past_tiles(ctx, pattern, p, scores);
}

}  // namespace detail

template <class P, class T, class KV>
void attend_forward_on(context& ctx, const P& pattern, const attend_forward_args<T, KV>& p) {
  const index_t d = p.q.extent(3);
  if constexpr (std::is_same_v<T, bfloat16>)
    if (detail::attends_in_tiles(ctx, pattern, p)) return detail::attend_in_tiles(ctx, pattern, p);
  detail::check_head_size("attend", d);
  if (detail::is_decoded(p)) return detail::attend_decode(ctx, pattern, p);
  const auto heads = detail::on_device(pattern, p.q.extent(1));
  detail::launch(ctx, "attend", detail::attend_forward_rows<std::remove_const_t<decltype(heads)>, T, KV>,
                 detail::row_blocks(p.q.shape()), 32 * detail::warps_per_block, 0, heads, p,
                 1.0f / std::sqrt(static_cast<float>(d)));
}

template <class P, class T>
void attend_backward_on(context& ctx, const P& pattern, const attend_backward_args<T>& p) {
  const index_t d = p.q.extent(3);
  if constexpr (std::is_same_v<T, bfloat16>)
    if (detail::tileable(ctx, d, p.q, p.k, p.v, p.out, p.dout, p.dq, p.dk, p.dv))
      return detail::attend_backward_tiles(ctx, pattern, p);
  detail::check_head_size("attend backward", d);
  const auto statistics = detail::statistics_of(ctx, p);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const auto heads = detail::on_device(pattern, p.q.extent(1));
  using heads_t = std::remove_const_t<decltype(heads)>;
  const unsigned blocks = detail::row_blocks(p.q.shape()), threads = 32 * detail::warps_per_block;
  detail::launch(ctx, "attend backward", detail::attend_backward_queries<heads_t, T>, blocks, threads, 0, heads, p,
                 statistics, scale);
  detail::launch(ctx, "attend backward", detail::attend_backward_keys<heads_t, T>, blocks, threads, 0, heads, p,
                 statistics, scale);
}

}  // namespace ratplus::cuda
