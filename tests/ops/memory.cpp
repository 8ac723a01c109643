#include "ratplus/ops/memory.hpp"

#include "support/backends.hpp"
#include "support/guarded.hpp"

using namespace ratplus;
using namespace ratplus_tests;

TEMPLATE_TEST_CASE("fill writes every element and no other", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const index_t n : awkward_sizes) {
    auto x = poisoned<T>(backend.ctx, dims(n));
    fill(backend.ctx, x.out(), rounded<T>(2.5));
    CHECK(same_bits(x.read(), array<T, 1>(dims(n), rounded<T>(2.5))));
  }
  auto ids = poisoned<token_t>(backend.ctx, dims(5));
  fill(backend.ctx, ids.out(), token_t{-3});
  CHECK(same_bits(ids.read(), array<token_t, 1>(dims(5), -3)));
}

TEMPLATE_TEST_CASE("copy moves rows between layouts and rounds to the other type", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  const auto check = [&]<class To, int R>(To, extents<R> shape, layout from, layout into) {
    const auto values = random_array<T>(shape, 4, 3);
    const guarded x(backend.ctx, values, from);
    auto y = poisoned<To>(backend.ctx, shape, into);
    copy(backend.ctx, x.in(), y.out());
    CHECK(same_bits(y.read(), values.template to<To>()));
  };
  for (const layout from : {layout::packed, layout::strided})
    for (const layout into : {layout::packed, layout::strided}) {
      check(T{}, dims(129), from, into);
      check(T{}, dims(7, 33), from, into);
      check(T{}, dims(2, 3, 17, 5), from, into);
      check(bfloat16{}, dims(31, 65), from, into);
      check(float{}, dims(2, 3, 5), from, into);
      check(float{}, dims(1, 1), from, into);
    }
}

TEMPLATE_TEST_CASE("upload and download are each other's inverse", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto values = random_array<T>(dims(1000), 5);
  auto x = poisoned<T>(backend.ctx, dims(1000));
  upload(backend.ctx, std::as_const(values).data.data(), x.out());
  const auto kept = values;
  for (T& v : values.data) v = rounded<T>(0);  // the host memory may be reused on return
  CHECK(same_bits(x.read(), kept));
  std::vector<T> back(1000);
  download(backend.ctx, x.in(), back.data());
  CHECK(back == kept.data);
}
