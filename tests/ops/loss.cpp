#include "ratplus/ops/loss.hpp"

#include <algorithm>

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

struct loss_oracle {
  double loss = 0;
  array<double, 2> dlogits;
};

template <class T>
loss_oracle cross_entropy_of(const array<T, 2>& logits, const array<token_t, 1>& labels, double weight) {
  loss_oracle o{0, array<double, 2>(logits.shape)};
  const index_t V = logits.shape[1];
  for (index_t n = 0; n < logits.shape[0]; ++n) {
    if (labels(n) == -100) continue;
    double most = number(logits(n, 0)), sum = 0;
    for (index_t i = 0; i < V; ++i) most = std::max(most, number(logits(n, i)));
    for (index_t i = 0; i < V; ++i) sum += std::exp(number(logits(n, i)) - most);
    o.loss += weight * (most + std::log(sum) - number(logits(n, labels(n))));
    for (index_t i = 0; i < V; ++i)
      o.dlogits(n, i) = weight * (std::exp(number(logits(n, i)) - most) / sum - (i == labels(n) ? 1 : 0));
  }
  return o;
}

}  // namespace

TEMPLATE_TEST_CASE("cross entropy and its gradient", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const auto check = [&](index_t N, index_t V, layout where, double size, index_t ignore_every) {
    CAPTURE(N, V, static_cast<int>(where), size, ignore_every);
    auto labels = random_tokens(N, V, 1);
    for (index_t n = ignore_every - 1; ignore_every > 0 && n < N; n += ignore_every) labels(n) = -100;
    const auto logits = random_array<T>(dims(N, V), 2, size);
    const double weight = 1.0 / static_cast<double>(N + 3);
    const loss_oracle expected = cross_entropy_of(logits, labels, weight);

    const guarded on_logits(ctx, logits, where);
    const guarded on_labels(ctx, labels);
    guarded loss(ctx, array<double, 1>(dims(1), 10.0));
    auto dlogits = poisoned<T>(ctx, logits.shape, where);
    cross_entropy(ctx, cross_entropy_args<T>{on_logits.in(), on_labels.in(), weight, loss.out(), dlogits.out()});
    const double added = loss.read()(0) - 10;
    CHECK(std::abs(added - expected.loss) <= 2e-6 * std::max(expected.loss, 1.0));
    CHECK(difference(dlogits.read(), expected.dlogits) <= TestType::tolerance);

    // Without a gradient, and with the gradient in the logits' place: the same.
    guarded alone(ctx, array<double, 1>(dims(1), 10.0)), third(ctx, array<double, 1>(dims(1), 10.0));
    cross_entropy(ctx, cross_entropy_args<T>{on_logits.in(), on_labels.in(), weight, alone.out(), {}});
    CHECK(same_bits(alone.read(), loss.read()));
    guarded in_place(ctx, logits, where);
    cross_entropy(ctx, cross_entropy_args<T>{in_place.in(), on_labels.in(), weight, third.out(), in_place.out()});
    CHECK(same_bits(third.read(), loss.read()));
    CHECK(same_bits(in_place.read(), dlogits.read()));
  };
  for (const index_t n : awkward_sizes)
    for (const layout where : {layout::packed, layout::strided}) {
      check(n, 19, where, 2, 0);
      if (n > 1) check(13, n, where, 2, 3);
    }
  check(40, 257, layout::strided, 8, 4);
  check(3, 5003, layout::packed, 1, 0);
}

TEMPLATE_TEST_CASE("cross entropy ignores labels of -100: no loss, no gradient", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  const guarded logits(ctx, random_array<T>(dims(3, 5), 1));
  const guarded labels(ctx, array<token_t, 1>(dims(3), -100));
  guarded loss(ctx, array<double, 1>(dims(1), 0.25));
  auto dlogits = poisoned<T>(ctx, dims(3, 5));
  cross_entropy(ctx, cross_entropy_args<T>{logits.in(), labels.in(), 1.0, loss.out(), dlogits.out()});
  CHECK(loss.read()(0) == 0.25);
  CHECK(difference(dlogits.read(), array<T, 2>(dims(3, 5))) <= 0.0);
}

TEMPLATE_TEST_CASE("cross entropy of far apart logits does not overflow", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto& ctx = backend.ctx;
  array<T, 2> logits(dims(2, 3));
  logits.data = {rounded<T>(1e4), rounded<T>(-1e4), rounded<T>(0), rounded<T>(-1e4), rounded<T>(-1e4), rounded<T>(0)};
  const guarded on_logits(ctx, logits);
  const guarded labels(ctx, tokens_of({2, 2}));
  guarded loss(ctx, array<double, 1>(dims(1)));
  auto dlogits = poisoned<T>(ctx, logits.shape);
  cross_entropy(ctx, cross_entropy_args<T>{on_logits.in(), labels.in(), 1.0, loss.out(), dlogits.out()});
  const loss_oracle expected = cross_entropy_of(logits, tokens_of({2, 2}), 1.0);
  CHECK(difference(loss.read()(0), expected.loss) <= 1e-6);
  CHECK(difference(dlogits.read(), expected.dlogits) <= TestType::tolerance);
}
