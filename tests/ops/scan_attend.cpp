// Recurrence, RoPE and attention in one call, against all three in double: whole sequences and pieces of them after a
// cache, every kind of pattern. Of the keys, those that a later query sees must be there afterwards and no others.

#include "ratplus/ops/scan_attend.hpp"

#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct scan_attend_case {
  index_t H = 2, d = 8;
  std::vector<numbers> groups = {{16, 0, 0}};            // of heads
  std::vector<numbers> kept = {};                        // of the cache; none: as the groups
  std::vector<std::vector<token_t>> calls = {{70, 70}};  // rows of every sequence
  bool past = false;                                     // a cache, from the first call on
  bool rotate = true;
  bool others_untouched = false;  // whether keys that no later query sees must not have been written
};

// Rows from[b] … from[b] + lengths[b] − 1 of every sequence b, poison behind them.
template <class T>
[[nodiscard]] array<T, 4> piece(const array<T, 4>& x, const std::vector<token_t>& from,
                                const std::vector<token_t>& lengths, index_t rows) {
  array<T, 4> part(dims(x.shape[0], x.shape[1], rows, x.shape[3]), poison<T>());
  for_each_index(part.shape, [&](const extents<4>& at) {
    const auto b = static_cast<std::size_t>(at[0]);
    if (at[2] < lengths[b]) part(at[0], at[1], at[2], at[3]) = x(at[0], at[1], from[b] + at[2], at[3]);
  });
  return part;
}

template <class KV, class Backend, class Cell>
void check_scan_attend(Backend& backend, const Cell& cell, const oracle::cell_step& step, const scan_attend_case& c) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  auto& ctx = backend.ctx;
  const auto B = static_cast<index_t>(c.calls.front().size());
  const std::vector<numbers>& kept = c.kept.empty() ? c.groups : c.kept;
  CAPTURE(cell.name(), B, c.H, c.d, c.groups.front().text(), c.groups.size(), kept.front().text(), c.calls, c.past,
          c.rotate);

  std::vector<token_t> totals(c.calls.front().size()), zeros(totals.size());
  for (const auto& lengths : c.calls)
    for (std::size_t b = 0; b < totals.size(); ++b) totals[b] += lengths[b];
  const index_t N = std::max<index_t>(1, *std::max_element(totals.begin(), totals.end()));
  const auto whole = dims(B, c.H, N, c.d);
  const auto q = random_array<T>(whole, 1), k = random_array<T>(whole, 2), v = random_array<T>(whole, 3),
             gate = random_array<T>(whole, 4, 2);
  array<double, 3> last;
  const array<double, 3> initial(dims(B, c.H, c.d));
  const auto rotated = [&](const array<double, 4>& x) { return c.rotate ? oracle::rope(x, 10000, zeros) : x; };
  const auto keys = rotated(oracle::scan(k, gate, step, initial, zeros, totals, last));
  const auto values = oracle::scan(v, gate, step, initial, zeros, totals, last);
  const auto expected =
      oracle::attention(rotated(q.template to<double>()), keys, values, sees(c.groups, c.H), totals).out;
  // Whether a query after position s can see it: anchors and sinks for ever, others for a while.
  const auto seen_later = [&, sees_key = sees(c.past ? kept : c.groups, c.H)](index_t h, index_t s) {
    return sees_key(h, s + 1, s);
  };

  array<head_slots, 1> slots_of(dims(c.H));
  slots_of.data = slots_of_heads(by_groups(kept), c.H, N);
  const guarded heads(ctx, slots_of);
  const extents<3> pool = dims(B, std::max<index_t>(pool_slots(slots_of.data), 1), c.d);
  auto k_pool = poisoned<KV>(ctx, pool), v_pool = poisoned<KV>(ctx, pool);
  guarded k_state(ctx, array<A, 3>(initial.shape)), v_state(ctx, array<A, 3>(initial.shape));
  const auto table = make_rope_table<A>(ctx, N, c.d, 10000.0);

  std::vector<token_t> first = zeros;
  for (const auto& lengths : c.calls) {
    const index_t rows = std::max<index_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    const auto shape = dims(B, c.H, rows, c.d);
    const auto part = [&](const array<T, 4>& x) {
      return guarded(ctx, piece(x, first, lengths, rows), layout::strided);
    };
    guarded on_q = part(q);
    const guarded on_k = part(k), on_v = part(v), on_gate = part(gate);
    const guarded on_first(ctx, tokens_of(first)), on_lengths(ctx, tokens_of(lengths));
    auto k_out = poisoned<T>(ctx, shape, layout::strided), v_out = poisoned<T>(ctx, shape, layout::strided),
         out = poisoned<T>(ctx, shape, layout::strided);
    auto scores = poisoned<A>(ctx, dims(B, c.H, rows));

    scan_attend_args<T, KV> p{.scores = scores.out()};
    p.scan.q = on_q.in(), p.scan.k = on_k.in(), p.scan.v = on_v.in(), p.scan.gate = on_gate.in();
    p.scan.q_out = on_q.out(), p.scan.k_out = k_out.out(), p.scan.v_out = v_out.out();
    if (c.rotate) p.scan.rope = table.view();
    p.attend.q = on_q.in(), p.attend.k = k_out.in(), p.attend.v = v_out.in(), p.attend.out = out.out();
    p.scan.spans.length = p.attend.spans.length = on_lengths.in();
    if (c.past) {
      p.scan.k_first = k_state.in(), p.scan.v_first = v_state.in();
      p.scan.k_last = k_state.out(), p.scan.v_last = v_state.out();
      p.scan.spans.first = p.attend.spans.first = on_first.in();
      p.attend.past = {k_pool.in(), v_pool.in(), heads.in(), slots_of.data.data()};
    }
    if (c.groups.size() == 1)
      scan_attend(ctx, cell, c.groups.front().pattern(), p);
    else
      scan_attend(ctx, cell, by_groups(c.groups), p);
    if (c.past)
      cache_append(ctx, cache_append_args<T, KV>{k_out.in(), v_out.in(), k_pool.out(), v_pool.out(), heads.in(),
                                                 p.attend.spans});

    // Rows of padding are zero.
    const auto there = [&](const array<double, 4>& x) {
      array<double, 4> y = piece(x, first, lengths, rows);
      for_each_index(shape, [&](const extents<4>& at) {
        if (at[2] >= lengths[static_cast<std::size_t>(at[0])]) y(at[0], at[1], at[2], at[3]) = 0;
      });
      return y;
    };
    // In full precision the errors of two operations add up.
    const double tolerance =
        std::max({2 * tolerance_of<A>, Backend::tolerance, c.past ? tolerance_of<KV> : Backend::tolerance});
    CHECK(difference(out.read(), there(expected)) <= tolerance);
    CHECK(difference(v_out.read(), there(values)) <= Backend::tolerance);
    auto keys_got = k_out.read();
    auto keys_expected = there(keys);
    index_t touched = 0;
    for_each_index(shape, [&](const extents<4>& at) {
      const auto b = static_cast<std::size_t>(at[0]);
      if (at[2] < lengths[b] && seen_later(at[1], first[b] + at[2])) return;
      T& x = keys_got(at[0], at[1], at[2], at[3]);
      touched += at[2] < lengths[b] && !std::isnan(number(x));
      x = rounded<T>(keys_expected(at[0], at[1], at[2], at[3]) = 0);
    });
    CHECK(difference(keys_got, keys_expected) <= Backend::tolerance);
    if (c.others_untouched) CHECK(touched == 0);
    for (std::size_t b = 0; b < first.size(); ++b) first[b] += lengths[b];
  }
}

template <class Backend>
void check_scan_attend(Backend& backend, const scan_attend_case& c) {
  check_scan_attend<typename Backend::scalar>(backend, gated_average{}, oracle::gated_average_step(), c);
}

// Own keys alone: anchors, with and without sinks, sinks without anchors, nothing.
const std::vector<numbers> alone{{16, 0, 0}, {2, 0, 0},   {7, 0, 0}, {500, 0, 0}, {13, 0, 5},
                                 {3, 0, 1},  {16, 0, 40}, {0, 0, 0}, {0, 0, 4}};

}  // namespace

TEMPLATE_TEST_CASE("scan_attend: every sparse pattern", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : sparse_patterns())
    for (const index_t d : {8, 64}) {
      scan_attend_case c;
      c.d = d;
      c.groups = {n};
      check_scan_attend(backend, c);
    }
}

TEMPLATE_TEST_CASE("scan_attend: queries that see no neighbours", "", RATPLUS_TEST_TUNED_BACKENDS) {
  TestType backend;
  scan_attend_case c;
  c.H = 3;
  for (const numbers& n : alone)
    for (const index_t d : {64, 128}) {
      c.d = d;
      c.groups = {n};
      c.past = false;
      c.calls = {{d == 64 ? 200 : 70, 64, 17, 0}};
      check_scan_attend(backend, c);
      c.past = true;
      c.calls = {{70, 1, 30}, {20, 66, 0}, {1, 1, 1}, {5, 20, 33}};
      check_scan_attend(backend, c);
    }
  c.d = 96;
  check_scan_attend(backend, c);
}

TEMPLATE_TEST_CASE("scan_attend: hybrids of heads, caches that keep more", "", RATPLUS_TEST_TUNED_BACKENDS) {
  TestType backend;
  scan_attend_case c;
  c.H = 4;
  c.d = 64;
  c.past = true;
  c.calls = {{70, 20}, {40, 60}, {1, 1}, {20, 0}};
  for (const std::vector<numbers>& groups : {std::vector<numbers>{{16, 0, 0}, {7, 0, 2}},
                                             std::vector<numbers>{{1, 0, 0}, {16, 0, 0}, {4, 3, 1}, {0, 0, 3}}}) {
    c.groups = groups;
    check_scan_attend(backend, c);
  }
  c.groups = {{16, 0, 2}};
  for (const numbers& kept : {numbers{1, 0, 0}, numbers{4, 0, 3}, numbers{16, 20, 2}, numbers{16, 0, 9}}) {
    c.kept = {kept};
    check_scan_attend(backend, c);
  }
  c.kept = {};
  check_scan_attend<bfloat16>(backend, gated_average{}, oracle::gated_average_step(), c);
}

TEMPLATE_TEST_CASE("scan_attend: other cells, no rotation", "", RATPLUS_TEST_TUNED_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t d : {64, 128})
    for (const bool rotate : {false, true}) {
      scan_attend_case c;
      c.d = d;
      c.rotate = rotate;
      c.groups = {{8, 0, 2}};
      c.calls = {{130, 65}};
      check_scan_attend<T>(backend, gated_average{}, oracle::gated_average_step(), c);
      check_scan_attend<T>(
          backend, none{}, [](double, double x, double, index_t) { return x; }, c);
      check_scan_attend<T>(
          backend, chunked<>(7),
          [](double h, double x, double g, index_t t) {
            return oracle::gated_average_step()(t % 7 == 0 ? 0.0 : h, x, g, t);
          },
          c);
    }
}
