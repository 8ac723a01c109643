// Attention with a past in a cache: however a sequence is cut into calls, whatever stands beside it in the batch, the
// rows are those of one pass over the whole.

#include "ratplus/ops/attend.hpp"
#include "support/backends.hpp"
#include "support/guarded.hpp"
#include "support/oracles.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

// lengths[call][sequence]: how many rows a sequence gets in a call.
using calls = std::vector<std::vector<token_t>>;

// `rows` positions of each of `B` sequences, cut alike.
calls cut(index_t B, const std::vector<token_t>& pieces) {
  calls all;
  for (const token_t n : pieces) all.push_back(std::vector<token_t>(static_cast<std::size_t>(B), n));
  return all;
}

calls one_by_one(index_t B, token_t prefill, token_t rows) {
  std::vector<token_t> pieces{prefill};
  for (token_t t = prefill; t < rows; ++t) pieces.push_back(1);
  return cut(B, pieces);
}

// Every sequence at its own position: prompts of different lengths, pauses, different ends.
calls ragged(token_t rows) {
  calls all{{5, 17, 0}, {9, 0, 1}, {1, 1, 1}, {0, 1, 20}, {1, 0, 1}};
  std::vector<token_t> at(3, 0);
  for (const auto& call : all)
    for (std::size_t b = 0; b < 3; ++b) at[b] += call[b];
  while (at[0] < rows - 2 || at[1] < rows || at[2] < rows - 7) {
    std::vector<token_t> call;
    for (std::size_t b = 0; b < 3; ++b) {
      const token_t end = b == 0 ? rows - 2 : b == 1 ? rows : rows - 7;
      call.push_back(at[b] < end ? 1 : 0);
      at[b] += call.back();
    }
    all.push_back(call);
  }
  return all;
}

template <class KV, class Backend, class P, class Kept>
void check_calls(Backend& backend, const std::string& name, const Kept& kept, const P& pattern,
                 const predicate& visible, const calls& all, index_t H = 2, index_t d = 8,
                 layout where = layout::strided) {
  using T = typename Backend::scalar;
  using A = accumulator_t<T>;
  auto& ctx = backend.ctx;
  const auto B = static_cast<index_t>(all.front().size());
  std::vector<token_t> total(all.front().size(), 0);
  for (const auto& call : all)
    for (std::size_t b = 0; b < total.size(); ++b) total[b] += call[b];
  const index_t rows = *std::max_element(total.begin(), total.end());
  CAPTURE(name, B, H, rows, d, all.size());
  const auto shape = dims(B, H, rows, d);
  const auto q = random_array<T>(shape, 1), k = random_array<T>(shape, 2), v = random_array<T>(shape, 3);
  const auto expected = oracle::attention(q, k, v, visible, total);

  array<head_slots, 1> slots_of(dims(H));
  slots_of.data = slots_of_heads(kept, H, rows);
  const index_t slots = pool_slots(slots_of.data);
  const guarded heads(ctx, slots_of);
  auto k_pool = poisoned<KV>(ctx, dims(B, std::max<index_t>(slots, 1), d), where);
  auto v_pool = poisoned<KV>(ctx, dims(B, std::max<index_t>(slots, 1), d), where);

  array<T, 4> out(shape);
  array<A, 3> lse(dims(B, H, rows));
  bool padding_is_zero = true;
  std::vector<token_t> first(total.size(), 0);
  for (const auto& lengths : all) {
    const index_t n = std::max<index_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    const auto piece_shape = dims(B, H, n, d);
    array<T, 4> q_piece(piece_shape, poison<T>()), k_piece(piece_shape, poison<T>()), v_piece(piece_shape, poison<T>());
    const auto in_use = [&](const extents<4>& at) { return at[2] < lengths[static_cast<std::size_t>(at[0])]; };
    const auto position = [&](const extents<4>& at) { return first[static_cast<std::size_t>(at[0])] + at[2]; };
    for_each_index(piece_shape, [&](const extents<4>& at) {
      if (!in_use(at)) return;
      q_piece(at[0], at[1], at[2], at[3]) = q(at[0], at[1], position(at), at[3]);
      k_piece(at[0], at[1], at[2], at[3]) = k(at[0], at[1], position(at), at[3]);
      v_piece(at[0], at[1], at[2], at[3]) = v(at[0], at[1], position(at), at[3]);
    });
    const guarded on_q(ctx, q_piece, where), on_k(ctx, k_piece, where), on_v(ctx, v_piece, where);
    const guarded on_first(ctx, tokens_of(first)), on_lengths(ctx, tokens_of(lengths));
    auto on_out = poisoned<T>(ctx, piece_shape, where);
    auto on_lse = poisoned<A>(ctx, dims(B, H, n));
    attend_forward_args<T, KV> args;
    args.q = on_q.in(), args.k = on_k.in(), args.v = on_v.in(), args.out = on_out.out(), args.lse = on_lse.out();
    args.past = {k_pool.in(), v_pool.in(), heads.in(), slots_of.data.data()};
    args.spans = {on_first.in(), on_lengths.in()};
    attend_forward(ctx, pattern, args);
    const auto piece = on_out.read();
    const auto piece_lse = on_lse.read();
    for_each_index(piece_shape, [&](const extents<4>& at) {
      const T x = piece(at[0], at[1], at[2], at[3]);
      if (in_use(at)) {
        out(at[0], at[1], position(at), at[3]) = x;
        lse(at[0], at[1], position(at)) = piece_lse(at[0], at[1], at[2]);
      } else {
        padding_is_zero = padding_is_zero && number(x) == 0;
      }
    });
    cache_append(ctx,
                 cache_append_args<T, KV>{
                     on_k.in(), on_v.in(), k_pool.out(), v_pool.out(), heads.in(), {on_first.in(), on_lengths.in()}});
    for (std::size_t b = 0; b < first.size(); ++b) first[b] += lengths[b];
  }
  CHECK(padding_is_zero);
  const double tolerance = std::is_same_v<KV, bfloat16> ? tolerance_of<bfloat16> : Backend::tolerance;
  CHECK(difference(out, expected.out) <= tolerance);
  CHECK(difference(lse, expected.lse) <= (std::is_same_v<KV, T> ? tolerance_of<A> : tolerance));

  // The cache holds what its pattern keeps and nothing else.
  const auto pool = k_pool.read();
  static_cast<void>(v_pool.read());  // its guards
  for (index_t b = 0; b < B; ++b)
    for (index_t h = 0; h < H; ++h) {
      const any_sparse& p = slots_of(h).where.kept();
      const index_t n = total[static_cast<std::size_t>(b)];
      const index_t held =
          p.dense() ? n : std::min(p.sinks(), n) + (p.anchored() ? n / p.dilation() : 0) + std::min(p.window(), n);
      index_t written = 0;
      for (index_t s = 0; s < slots_of(h).where.slots(); ++s)
        written += !std::isnan(number(pool(b, slots_of(h).offset + s, 0)));
      CHECK(written == held);
    }
}

}  // namespace

TEMPLATE_TEST_CASE("decode: step by step equals the whole, for every sparse pattern", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const numbers& n : sparse_patterns()) {
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), one_by_one(2, 1, 45));
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), one_by_one(1, 31, 40));
  }
}

TEMPLATE_TEST_CASE("decode: prefill in pieces equals the whole, for every sparse pattern", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const numbers& n : sparse_patterns())
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n),
                   cut(2, {16, 1, 3, 33, 17, 2, 65, 1}));
}

// Long enough for tiles of 128 rows, and rows that the copy engine of a GPU can address.
TEMPLATE_TEST_CASE("decode: long pieces equal the whole, at one position or several", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  const calls ragged_pieces{{40, 150, 0}, {129, 3, 70}, {1, 20, 131}, {60, 60, 1}};
  const auto check = [&](const numbers& n, const calls& all, index_t d) {
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), all, 2, d, layout::packed);
  };
  for (const numbers& n : sparse_patterns()) check(n, ragged_pieces, 16);
  for (const index_t d : {64, 72, 128}) check({16, 40, 4}, cut(1, {150, 40, 1, 60}), d);
  for_each_static_pattern(4, [&](const char* name, const auto& pattern, const predicate& visible) {
    check_calls<T>(backend, name, pattern, pattern, visible, ragged_pieces, 4, 16, layout::packed);
  });
}

TEMPLATE_TEST_CASE("decode: each sequence of a batch at its own position", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const numbers& n : sparse_patterns())
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), ragged(50));
}

TEMPLATE_TEST_CASE("decode: pattern types, hybrids and a user's own pattern", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for_each_static_pattern(4, [&](const char* name, const auto& pattern, const predicate& visible) {
    check_calls<T>(backend, name, pattern, pattern, visible, ragged(40), 4, 16);
    check_calls<T>(backend, name, pattern, pattern, visible, cut(1, {20, 1, 1, 30, 1}), 4, 16, layout::packed);
  });
  const std::vector<numbers> groups{{1, 0, 0}, {4, 3, 1}, {0, 7, 0}};
  check_calls<T>(backend, "three groups", by_groups(groups), by_groups(groups), sees(groups, 6), ragged(40), 6, 5);
}

TEMPLATE_TEST_CASE("decode: a cache serves every sparser pattern", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  const auto check = [&](const numbers& kept, const numbers& asked) {
    REQUIRE(serves(kept.pattern(), asked.pattern()));
    check_calls<T>(backend, kept.text() + " serves " + asked.text(), any_by_head(kept.pattern()), asked.pattern(),
                   sees(asked), ragged(45));
  };
  for (const numbers& asked : sparse_patterns()) check({1, 0, 0}, asked);
  for (const numbers& asked : {numbers{4, 10, 3}, numbers{8, 5, 2}, numbers{4, 0, 0}, numbers{12, 10, 0},
                               numbers{0, 7, 1}, numbers{16, 0, 3}, numbers{0, 0, 0}})
    check({4, 10, 3}, asked);
  check({0, 20, 5}, {0, 3, 4});
  check({2, 0, 0}, {6, 0, 0});
}

TEMPLATE_TEST_CASE("decode: keys and values may be cached in bfloat16", "", RATPLUS_TEST_BACKENDS) {
  TestType backend;
  for (const numbers& n : {numbers{1, 0, 0}, numbers{8, 6, 3}, numbers{0, 9, 2}, numbers{16, 0, 0}})
    check_calls<bfloat16>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), ragged(60), 2, 16);
}

TEMPLATE_TEST_CASE("decode: head sizes and long pasts", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t d : {1, 2, 17, 64, 128}) {
    const numbers n{16, 33, 4};
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), cut(1, {200, 1, 1, 63, 1}), 2, d);
  }
  for (const numbers& n : {numbers{1, 0, 0}, numbers{64, 0, 0}, numbers{0, 300, 4}})
    check_calls<T>(backend, n.text(), any_by_head(n.pattern()), n.pattern(), sees(n), cut(1, {700, 1, 1}), 1, 32);
}
