// What the operations say when shapes do not fit: the names and the numbers.

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/ops/rope.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/recurrence/gated_average.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/patterns.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

reference::context ctx;

// Views of shapes; nothing is read before the check throws.
float memory[64];
double wide_memory[64];
token_t ids[64];
template <class... N>
view<float, static_cast<int>(sizeof...(N))> of(N... n) {
  return as_view(memory, n...);
}
template <class... N>
view<const float, static_cast<int>(sizeof...(N))> in(N... n) {
  return of(n...);
}
view<const token_t, 1> tokens(index_t n) { return as_view(static_cast<const token_t*>(ids), n); }

template <class F>
void check_refused(const std::string& text, F&& f) {
  CHECK_THROWS_AS(f(), shape_error);
  CHECK_THROWS_WITH(f(), contains(text));
}

}  // namespace

TEST_CASE("shape errors: matmul, memory") {
  check_refused("matmul: a is (2, 3), expected (4, 3)", [] {
    matmul(ctx, matmul_args<float>{in(2, 3), in(3, 5), of(4, 5), {}});
  });
  check_refused("matmul: b is (2, 5), expected (3, 5)", [] {
    matmul(ctx, matmul_args<float>{in(4, 3), in(2, 5), of(4, 5), {}});
  });
  check_refused("matmul: b is (3, 5), expected (5, 3)", [] {
    matmul(ctx, matmul_args<float>{in(4, 3), in(3, 5), of(4, 5), {}, false, true});
  });
  check_refused("matmul: a is (4, 3), expected (4, 2)", [] {
    matmul(ctx, matmul_args<float>{in(4, 3), in(4, 5), of(2, 5), {}, true});
  });
  check_refused("matmul: addend is (5, 4), expected (4, 5)", [] {
    matmul(ctx, matmul_args<float>{in(4, 3), in(3, 5), of(4, 5), in(5, 4)});
  });
  check_refused("copy: destination is (2, 4), expected (2, 3)", [] { copy(ctx, in(2, 3), of(2, 4)); });
}

TEST_CASE("shape errors: norm, gate, gelu") {
  check_refused("rms_norm: weight is (4), expected (3)", [] {
    rms_norm_forward(ctx, rms_norm_forward_args<float>{in(2, 3), in(4), of(2, 3), {}});
  });
  check_refused("rms_norm: y is (3, 2), expected (2, 3)", [] {
    rms_norm_forward(ctx, rms_norm_forward_args<float>{in(2, 3), in(3), of(3, 2), {}});
  });
  check_refused("rms_norm: rstd is (3), expected (2)", [] {
    rms_norm_forward(ctx, rms_norm_forward_args<float>{in(2, 3), in(3), of(2, 3), of(3)});
  });
  check_refused("dweight is (2), expected (3)", [] {
    rms_norm_backward(ctx, rms_norm_backward_args<float>{in(2, 3), in(3), in(2), in(2, 3), of(2, 3), of(2)});
  });
  check_refused("gate: o is (3, 2), expected (2, 3)", [] { gate_forward(ctx, in(2, 3), in(3, 2), of(2, 3)); });
  check_refused("gate backward: do is (3, 2), expected (2, 3)",
                [] { gate_backward(ctx, in(2, 3), in(2, 3), in(2, 3), of(2, 3), of(3, 2)); });
  check_refused("gelu: y is (2, 2), expected (2, 3)", [] { gelu_forward(ctx, in(2, 3), of(2, 2)); });
  check_refused("gelu backward: dy is (2, 2), expected (2, 3)",
                [] { gelu_backward(ctx, in(2, 3), in(2, 2), of(2, 3)); });
}

TEST_CASE("shape errors: embed, cross entropy, adamw, sample") {
  check_refused("embed: x is (4, 2), expected (4, 3)", [] { embed_forward(ctx, tokens(4), in(5, 3), of(4, 2)); });
  check_refused("embed backward: dx is (3, 3), expected (4, 3)",
                [] { embed_backward(ctx, tokens(4), in(3, 3), of(5, 3)); });
  check_refused("cross entropy: labels is (3), expected (2)", [] {
    cross_entropy(ctx, cross_entropy_args<float>{in(2, 5), tokens(3), 1, as_view(wide_memory, 1), {}});
  });
  check_refused("cross entropy: loss is (2), expected (1)", [] {
    cross_entropy(ctx, cross_entropy_args<float>{in(2, 5), tokens(2), 1, as_view(wide_memory, 2), {}});
  });
  check_refused("cross entropy: dlogits is (5, 2), expected (2, 5)", [] {
    cross_entropy(ctx, cross_entropy_args<float>{in(2, 5), tokens(2), 1, as_view(wide_memory, 1), of(5, 2)});
  });
  check_refused("adamw: v is (4), expected (3)", [] { adamw(ctx, adamw_args<float>{of(3), in(3), of(3), of(4)}, {}); });
  check_refused("sample: position is (3), expected (2)", [] {
    sample(ctx, sample_args<float>{in(2, 5), tokens(3), as_view(ids, 2)}, {});
  });
}

TEST_CASE("shape errors: scan") {
  scan_forward_args<float> good;
  good.k = in(1, 2, 3, 4), good.gate = in(1, 2, 3, 4), good.k_out = of(1, 2, 3, 4);
  const auto refused = [&](const std::string& text, auto&& change) {
    check_refused(text, [&] {
      auto args = good;
      change(args);
      scan_forward(ctx, gated_average{}, args);
    });
  };
  CHECK_NOTHROW(scan_forward(ctx, gated_average{}, good));
  refused("scan: gate is (0, 0, 0, 0), expected (1, 2, 3, 4)", [](auto& a) { a.gate = {}; });
  refused("scan: k is (1, 2, 3, 5), expected (1, 2, 3, 4)", [](auto& a) { a.k_out = of(1, 2, 3, 5); });
  refused("scan: v is (1, 2, 2, 4), expected (1, 2, 3, 4)",
          [](auto& a) { a.v = in(1, 2, 2, 4), a.v_out = of(1, 2, 2, 4); });
  refused("scan: rope table is for head size 6, heads have 4", [](auto& a) { a.rope = in(3, 6); });
  refused("scan: rope table has 2 positions, rows need 3", [](auto& a) { a.rope = in(2, 4); });
  refused("scan: k_first is (1, 2, 3), expected (1, 2, 4)", [](auto& a) { a.k_first = in(1, 2, 3); });
  refused("scan: k_last is (2, 2, 4), expected (1, 2, 4)", [](auto& a) { a.k_last = of(2, 2, 4); });
  refused("scan: first is (2), expected (1)", [](auto& a) { a.spans.first = tokens(2); });
  refused("scan: length is (3), expected (1)", [](auto& a) { a.spans.length = tokens(3); });
  check_refused("scan: rope needs an even head size, got 3", [] {
    scan_forward_args<float> a;
    a.q = in(1, 1, 2, 3), a.q_out = of(1, 1, 2, 3), a.rope = in(2, 3);
    scan_forward(ctx, gated_average{}, a);
  });
  check_refused("scan backward: gate is (0, 0, 0, 0), expected (1, 2, 3, 4)", [] {
    scan_backward_args<float> a;
    a.k = in(1, 2, 3, 4), a.k_out = in(1, 2, 3, 4), a.dk_out = in(1, 2, 3, 4), a.dk = of(1, 2, 3, 4);
    scan_backward(ctx, gated_average{}, a);
  });
}

TEST_CASE("shape errors: attend and its cache") {
  attend_forward_args<float> good;
  good.q = in(1, 4, 3, 2), good.k = in(1, 4, 3, 2), good.v = in(1, 4, 3, 2), good.out = of(1, 4, 3, 2);
  const auto refused = [&](const std::string& text, auto&& change) {
    check_refused(text, [&] {
      auto args = good;
      change(args);
      attend_forward(ctx, dense{}, args);
    });
  };
  refused("attend: keys have 6 heads, queries 4", [](auto& a) { a.k = in(1, 6, 3, 2); });
  refused("attend: keys have head size 4, queries 2", [](auto& a) { a.k = in(1, 4, 3, 4); });
  refused("attend: keys is (1, 4, 2, 2), expected (1, 4, 3, 2)", [](auto& a) { a.k = in(1, 4, 2, 2); });
  refused("attend: values is (2, 4, 3, 2), expected (1, 4, 3, 2)", [](auto& a) { a.v = in(2, 4, 3, 2); });
  refused("attend: out is (1, 4, 3, 1), expected (1, 4, 3, 2)", [](auto& a) { a.out = of(1, 4, 3, 1); });
  refused("attend: lse is (1, 4, 2), expected (1, 4, 3)", [](auto& a) { a.lse = of(1, 4, 2); });
  static const head_slots slots[4] = {};
  refused("attend: past heads is (3), expected (4)", [](auto& a) {
    a.past = {in(1, 5, 2), in(1, 5, 2), as_view(slots, 3)};
  });
  refused("attend: past keys is (1, 5, 3), expected (1, 5, 2)", [](auto& a) {
    a.past = {in(1, 5, 3), in(1, 5, 3), as_view(slots, 4)};
  });
  refused("attend: past values is (1, 4, 2), expected (1, 5, 2)", [](auto& a) {
    a.past = {in(1, 5, 2), in(1, 4, 2), as_view(slots, 4)};
  });
  refused("attend: a past needs spans.first, the number of its positions", [](auto& a) {
    a.past = {in(1, 5, 2), in(1, 5, 2), as_view(slots, 4)};
  });
  const by_head<dense, local<2>, dense> three;
  CHECK_THROWS_AS(attend_forward(ctx, three, good), value_error);
  CHECK_THROWS_WITH(attend_forward(ctx, three, good), contains("3 patterns do not divide 4 heads evenly"));
  check_refused("attend backward: dk is (1, 4, 2, 2), expected (1, 4, 3, 2)", [] {
    const auto x = in(1, 4, 3, 2);
    attend_backward(
        ctx, dense{},
        attend_backward_args<float>{x, x, x, x, x, in(1, 4, 3), of(1, 4, 3, 2), of(1, 4, 2, 2), of(1, 4, 3, 2), {}});
  });
  check_refused("cache append: first is (0), expected (1)", [] {
    cache_append(
        ctx, cache_append_args<float>{in(1, 4, 3, 2), in(1, 4, 3, 2), of(1, 5, 2), of(1, 5, 2), as_view(slots, 4), {}});
  });
  check_refused("cache append: key pool is (2, 5, 2), expected (1, 5, 2)", [] {
    cache_append(
        ctx, cache_append_args<float>{in(1, 4, 3, 2), in(1, 4, 3, 2), of(2, 5, 2), of(1, 5, 2), as_view(slots, 4), {}});
  });
}
