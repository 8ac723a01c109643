// A mixer's core: one call is scan, attention, append and output gate one after the other, whatever way a backend does
// it, for prompts and for decoding steps, with sequences at their own positions.

#include "ratplus/ops/core.hpp"

#include "ratplus/ops/rope.hpp"
#include "ratplus/recurrence/chunked.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "ratplus/recurrence/none.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

// One way's memory and outputs.
template <class T, class KV, class Ctx>
struct memory_of {
  using A = accumulator_t<T>;
  guarded<Ctx, KV, 3> k_pool, v_pool;
  guarded<Ctx, A, 3> k_state, v_state;

  memory_of(Ctx& ctx, extents<3> pool, extents<3> state)
      : k_pool(ctx, random_array<KV>(pool, 11), layout::packed),
        v_pool(ctx, random_array<KV>(pool, 12), layout::packed),
        k_state(ctx, random_array<A>(state, 13)),
        v_state(ctx, random_array<A>(state, 14)) {}
};

// Calls of lengths[call][sequence] rows; the memory holds what `kept` keeps.
template <class KV, class Backend, class Cell, class P, class Kept>
void check_core(Backend& backend, const Cell& cell, const P& pattern, const Kept& kept, index_t H, index_t d,
                const std::vector<std::vector<token_t>>& calls) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  auto& ctx = backend.ctx;
  using Ctx = std::remove_reference_t<decltype(ctx)>;
  constexpr index_t positions = 90;
  const auto B = static_cast<index_t>(calls.front().size());
  CAPTURE(cell.name(), H, d);
  array<head_slots, 1> slots_of(dims(H));
  slots_of.data = slots_of_heads(kept, H, positions);
  const index_t slots = pool_slots(slots_of.data);
  const guarded heads(ctx, slots_of);
  const auto rope = make_rope_table<A>(ctx, positions, d, 10000.0);
  const extents<3> pool = dims(B, std::max<index_t>(slots, 1), d), state = dims(B, H, d);
  memory_of<T, KV, Ctx> whole(ctx, pool, state), apart(ctx, pool, state);

  std::vector<token_t> first(calls.front().size(), 0);
  std::uint64_t seed = 20;
  for (const auto& lengths : calls) {
    const index_t n = std::max<index_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    const auto shape = dims(B, H, n, d);
    const auto q = random_array<T>(shape, ++seed), k = random_array<T>(shape, ++seed),
               v = random_array<T>(shape, ++seed), gate = random_array<T>(shape, ++seed);
    const guarded out_gate(ctx, random_array<T>(dims(B * n, H * d), ++seed), layout::strided);
    const guarded on_k(ctx, k, layout::strided), on_gate(ctx, gate, layout::strided);
    const guarded on_first(ctx, tokens_of(first)), on_lengths(ctx, tokens_of(lengths));
    const sequence_spans spans{on_first.in(), on_lengths.in()};
    const auto rows = [&] { return poisoned<T>(ctx, shape, layout::strided); };
    const auto flat = [&] { return poisoned<T>(ctx, dims(B * n, H * d)); };

    guarded q_whole(ctx, q, layout::strided), v_whole(ctx, v, layout::strided);
    auto k_scanned = rows(), v_scanned = rows();
    auto attended = flat(), y = flat();
    auto lse = poisoned<A>(ctx, dims(B, H, n));
    core_forward_args<T, KV> p{.q = q_whole.out(),
                               .k = on_k.in(),
                               .v = v_whole.in(),
                               .gate = on_gate.in(),
                               .out_gate = out_gate.in(),
                               .rope = rope,
                               .k_scanned = k_scanned.out()};
    p.v_scanned = IdentityCell<Cell> ? v_whole.out() : v_scanned.out();
    p.attended = attended.out(), p.lse = lse.out(), p.y = y.out();
    p.memory = {whole.k_pool.out(),  whole.v_pool.out(),  heads.in(), slots_of.data.data(),
                whole.k_state.out(), whole.v_state.out(), spans};
    core_forward(ctx, cell, pattern, p);

    guarded q_apart(ctx, q, layout::strided), v_apart(ctx, v, layout::strided);
    auto keys = rows(), values = rows();
    auto attended_apart = flat(), y_apart = flat();
    scan_forward_args<T> scan{.q = q_apart.in(),
                              .k = on_k.in(),
                              .v = v_apart.in(),
                              .gate = on_gate.in(),
                              .q_out = q_apart.out(),
                              .k_out = keys.out(),
                              .v_out = values.out(),
                              .rope = rope};
    if constexpr (!IdentityCell<Cell>) {
      scan.k_first = apart.k_state.in(), scan.v_first = apart.v_state.in();
      scan.k_last = apart.k_state.out(), scan.v_last = apart.v_state.out();
    }
    scan.spans = spans;
    scan_forward(ctx, cell, scan);
    attend_forward_args<T, KV> attend{.q = q_apart.in(), .k = keys.in(), .v = values.in()};
    attend.out = attended_apart.out().split_last(H).split_first(B).swap(1, 2);
    attend.past = {apart.k_pool.in(), apart.v_pool.in(), heads.in(), slots_of.data.data()};
    attend.spans = spans;
    attend_forward(ctx, pattern, attend);
    cache_append(ctx, cache_append_args<T, KV>{keys.in(), values.in(), apart.k_pool.out(), apart.v_pool.out(),
                                               heads.in(), spans});
    gate_forward<Ctx, T>(ctx, attended_apart.in(), out_gate.in(), y_apart.out());

    CHECK(difference(y.read(), y_apart.read()) <= Backend::tolerance);
    for (std::size_t b = 0; b < first.size(); ++b) first[b] += lengths[b];
  }
  const double cached = std::is_same_v<KV, bfloat16> ? tolerance_of<bfloat16> : Backend::tolerance;
  CHECK(difference(whole.k_pool.read(), apart.k_pool.read()) <= cached);
  CHECK(difference(whole.v_pool.read(), apart.v_pool.read()) <= cached);
  CHECK(difference(whole.k_state.read(), apart.k_state.read()) <= tolerance_of<A>);
  CHECK(difference(whole.v_state.read(), apart.v_state.read()) <= tolerance_of<A>);
}

template <class KV, class Backend, class Cell, class P>
void check_core(Backend& backend, const Cell& cell, const P& pattern, index_t H, index_t d,
                const std::vector<std::vector<token_t>>& calls) {
  check_core<KV>(backend, cell, pattern, pattern, H, d, calls);
}

// A prompt, steps of every sequence, of some, of none.
const std::vector<std::vector<token_t>> prompt_and_steps{{20, 33, 0}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}, {0, 0, 0},
                                                         {1, 0, 1},   {3, 1, 2}, {1, 1, 1}, {1, 1, 0}, {1, 1, 1}};

}  // namespace

TEMPLATE_TEST_CASE("core: a call is its operations one after the other", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const numbers& n : sparse_patterns())
    check_core<T>(backend, gated_average{}, n.pattern(), 2, 16, prompt_and_steps);
  for (const index_t d : {2, 18, 64, 128, 136})
    check_core<T>(backend, gated_average{}, numbers{8, 6, 2}.pattern(), 3, d, prompt_and_steps);
}

TEMPLATE_TEST_CASE("core: other cells, hybrids and caches of another type", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  check_core<T>(backend, none{}, numbers{4, 5, 1}.pattern(), 2, 16, prompt_and_steps);
  check_core<T>(backend, chunked<>(7), numbers{4, 0, 0}.pattern(), 2, 16, prompt_and_steps);
  check_core<T>(backend, gated_average{}, by_groups({{1, 0, 0}, {4, 3, 1}, {0, 7, 0}}), 6, 16, prompt_and_steps);
  check_core<bfloat16>(backend, gated_average{}, numbers{8, 6, 3}.pattern(), 2, 32, prompt_and_steps);
}

TEMPLATE_TEST_CASE("core: queries that see no neighbours", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t d : {64, 128}) {
    for (const numbers& n : {numbers{16, 0, 0}, numbers{3, 0, 2}, numbers{0, 0, 3}})
      check_core<T>(backend, gated_average{}, n.pattern(), 3, d, prompt_and_steps);
    check_core<T>(backend, chunked<>(7), by_groups({{4, 0, 0}, {1, 0, 0}, {8, 0, 1}}), 3, d, prompt_and_steps);
    check_core<T>(backend, gated_average{}, numbers{8, 0, 2}.pattern(), numbers{4, 6, 3}.pattern(), 3, d,
                  prompt_and_steps);
  }
}

// Without a memory: y is the same whether or not a backward pass follows, and what that pass reads is there if it does.
TEMPLATE_TEST_CASE("core: with and without a backward pass to follow", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  using A = accumulator_t<T>;
  TestType backend;
  auto& ctx = backend.ctx;
  const index_t B = 2, H = 3, rows = 70;
  for (const numbers& n : {numbers{16, 0, 2}, numbers{1, 0, 0}, numbers{8, 6, 2}})
    for (const index_t d : {16, 128}) {
      CAPTURE(n.text(), d);
      const auto shape = dims(B, H, rows, d);
      const auto q = random_array<T>(shape, 1);
      const guarded k(ctx, random_array<T>(shape, 2)), v(ctx, random_array<T>(shape, 3)),
          gate(ctx, random_array<T>(shape, 4));
      const guarded out_gate(ctx, random_array<T>(dims(B * rows, H * d), 5));

      const auto rope = make_rope_table<A>(ctx, rows, d, 10000.0);
      array<T, 2> y[2];
      for (const bool backward : {false, true}) {
        guarded on_q(ctx, q);
        auto keys = poisoned<T>(ctx, shape), values = poisoned<T>(ctx, shape);
        auto attended = poisoned<T>(ctx, dims(B * rows, H * d)), on_y = poisoned<T>(ctx, dims(B * rows, H * d));
        auto lse = poisoned<A>(ctx, dims(B, H, rows));
        core_forward_args<T> p{.q = on_q.out(),
                               .k = k.in(),
                               .v = v.in(),
                               .gate = gate.in(),
                               .out_gate = out_gate.in(),
                               .rope = rope,
                               .k_scanned = keys.out(),
                               .v_scanned = values.out(),
                               .attended = attended.out(),
                               .lse = lse.out(),
                               .y = on_y.out(),
                               .backward = backward};
        core_forward(ctx, gated_average{}, n.pattern(), p);
        y[backward] = on_y.read();
        if (!backward) continue;
        auto q_alone = poisoned<T>(ctx, shape), keys_alone = poisoned<T>(ctx, shape), out = poisoned<T>(ctx, shape);
        auto lse_alone = poisoned<A>(ctx, dims(B, H, rows));
        guarded q_in(ctx, q);
        scan_forward(ctx, gated_average{},
                     scan_forward_args<T>{.q = q_in.in(),
                                          .k = k.in(),
                                          .gate = gate.in(),
                                          .q_out = q_alone.out(),
                                          .k_out = keys_alone.out(),
                                          .rope = rope});
        CHECK(difference(keys.read(), keys_alone.read()) <= TestType::tolerance);
        attend_forward(
            ctx, n.pattern(),
            attend_forward_args<T>{
                .q = q_alone.in(), .k = keys_alone.in(), .v = values.in(), .out = out.out(), .lse = lse_alone.out()});
        CHECK(difference(lse.read(), lse_alone.read()) <= TestType::tolerance);
      }
      CHECK(difference(y[0], y[1]) <= TestType::tolerance);
    }
}
