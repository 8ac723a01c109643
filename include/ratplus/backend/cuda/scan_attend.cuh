#pragma once
// Recurrence and attention whose keys are wanted for attention alone. A pass moves whole tensors, so what counts is how
// many: seven and four, of which the own keys are one to write and one to read. Where queries see no neighbours the
// scan gives the own keys' scores, one number a row, and writes the few keys that later queries see: nine are left.

#include "ratplus/backend/cuda/attend.cuh"
#include "ratplus/backend/cuda/scan.cuh"
#include "ratplus/ops/scan_attend.hpp"

namespace ratplus::cuda {

/// Returns false where this is no gain, or the kernels in tiles cannot serve the call.
template <class C, class P, class T, class KV>
bool scan_attend_on(context& ctx, const C& cell, const P& pattern, const scan_attend_args<T, KV>& p) {
  using heads_t = std::remove_const_t<decltype(detail::on_device(pattern, index_t{}))>;
  if constexpr (AssociativeCell<C> && std::is_same_v<T, bfloat16> && detail::sparse_on_device<heads_t>) {
    const extents<4>& shape = p.attend.q.shape();
    const index_t groups = head_groups(pattern), d = shape[3];
    bool alone = false;  // with its own key, some head's query
    for (index_t g = 0; g < groups; ++g)
      visit_head(pattern, g, groups, [&](const auto& each) { alone = alone || detail::sees_own_key_alone(each); });
    if (!alone || (d != 64 && d != 128) || !detail::scans_in_tiles<C>(p.scan) ||
        !detail::attends_in_tiles(ctx, pattern, p.attend))
      return false;
    detail::require_device_cell<C>();
    const detail::seen_keys wanted{p.scores, detail::grouped_on_device(pattern, shape[1]), p.attend.past.heads};
    if (d == 64)
      detail::scan_forward_wide<32>(ctx, cell, p.scan, shape, wanted);
    else
      detail::scan_forward_wide<64>(ctx, cell, p.scan, shape, wanted);
    detail::attend_in_tiles(ctx, pattern, p.attend, p.scores);
    return true;
  } else {
    return false;
  }
}

}  // namespace ratplus::cuda
