#pragma once
// Recurrence, RoPE and attention over what they make, for callers who keep nothing but the result and the rows that
// later queries see (SPEC §1, §2). scan_forward and attend_forward one after the other. Where a query sees no
// neighbours, most keys are seen by their own query alone: all that is needed of such a key is one score,
//
//     q'_t · k̃'_t = q_t · k̃_t        (the same rotation on both sides)
//
// and a backend may take it from the scan and never write the key (`scan_attend_on`).

#include "ratplus/ops/attend.hpp"
#include "ratplus/ops/scan.hpp"

namespace ratplus {

template <class T, class KV = T>
struct scan_attend_args {
  scan_forward_args<T> scan = {};          // q and k given
  attend_forward_args<T, KV> attend = {};  // q, k: the scan's q_out, k_out; v: its v_out where it is given v
  view<accumulator_t<T>, 3> scores = {};   // (B, H, T), scratch
};

/// attend.out and the scan's v_out and states are written as by the two operations. Of k_out, those rows are of meaning
/// that a later query can see: under what the past keeps, or under `pattern` without a past. Of q_out and scores none
/// are.
template <Context Ctx, class C, class P, class T, class KV>
void scan_attend(Ctx& ctx, const C& cell, const P& pattern, const scan_attend_args<T, KV>& p) {
  if constexpr (requires { scan_attend_on(ctx, cell, pattern, p); }) {
    require_cell<C>();
    require_head_pattern<P>();
    const extents<4>& shape = p.attend.q.shape();
    check_heads(pattern, shape[1]);
    detail::check_scan(cell, p.scan);
    detail::check_attend(p.attend);
    detail::check_shape("scan_attend", "scan's q", p.scan.q, shape);
    detail::check_shape("scan_attend", "scan's k", p.scan.k, shape);
    detail::check_shape("scan_attend", "scores", p.scores, {{shape[0], shape[1], shape[2]}});
    if (shape.product() > 0 && scan_attend_on(ctx, cell, pattern, p)) return;
  }
  scan_forward(ctx, cell, p.scan);
  attend_forward(ctx, pattern, p.attend);
}

}  // namespace ratplus
