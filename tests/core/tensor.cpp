#include "ratplus/core/tensor.hpp"

#include <utility>

#include "support/catch.hpp"

using namespace ratplus;
using ratplus_tests::contains;

TEST_CASE("a tensor owns contiguous aligned memory and moves") {
  auto a = make_tensor<float>(2, 3, 5);
  CHECK(a.size() == 30);
  CHECK(a.bytes() == 120);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % host_space::alignment == 0);
  for (index_t i = 0; i < a.size(); ++i) a.data()[i] = static_cast<float>(i);

  const float* data = a.data();
  tensor<float, 3> b = std::move(a);
  CHECK(b.data() == data);
  CHECK(b.view()(1, 2, 4) == 29.0f);
  CHECK(b.as(6, 5)(5, 4) == 29.0f);
  CHECK_THROWS_AS(b.as(6, 6), shape_error);
  CHECK_THROWS_WITH(b.as(6, 6), contains("30 elements seen as 36"));
}

TEST_CASE("large tensors are aligned, wholly their own and give back what they took") {
  constexpr index_t threshold = (index_t{16} << 20) / static_cast<index_t>(sizeof(float));
  for (const index_t size : {threshold - 1, threshold, threshold + 1, 3 * threshold}) {
    auto a = make_tensor<float>(size), b = make_tensor<float>(size);
    CAPTURE(size);
    for (auto* x : {&a, &b}) {
      CHECK(reinterpret_cast<std::uintptr_t>(x->data()) % host_space::alignment == 0);
      x->data()[0] = x->data()[size - 1] = x == &a ? 1.0f : 2.0f;
    }
    const tensor<float, 1> moved = std::move(a);
    CHECK((moved.data()[0] == 1.0f && moved.data()[size - 1] == 1.0f));
    CHECK((b.data()[0] == 2.0f && b.data()[size - 1] == 2.0f));
  }
}

TEST_CASE("an empty tensor has no memory, a negative extent is an error") {
  CHECK(make_tensor<double>(0, 7).data() == nullptr);
  CHECK_THROWS_AS((make_tensor<double>(3, -1)), shape_error);
  CHECK_THROWS_WITH((make_tensor<double>(3, -1)), contains("extent 1 is -1"));
}

TEST_CASE("views slice, split and swap without copying") {
  auto t = make_tensor<int>(4, 6);  // (rows, channels)
  for (int i = 0; i < 24; ++i) t.data()[i] = i;
  const view<int, 2> v = t;

  CHECK(v.slice(0, 1, 3)(0, 0) == 6);
  CHECK(v.slice(1, 2, 4)(3, 1) == 21);
  CHECK(!v.slice(1, 2, 4).contiguous());
  CHECK(v.slice(0, 1, 3).contiguous());

  const auto heads = v.split_last(2);  // (4, 2, 3)
  CHECK(heads(3, 1, 2) == 23);
  CHECK(heads.swap(0, 1)(1, 3, 2) == 23);
  CHECK(v.split_first(2)(1, 0, 5) == 17);
  CHECK(v[2][5] == 17);
  CHECK(v.row(2) == t.data() + 12);

  CHECK(v);
  CHECK_FALSE(view<int, 2>{});
}
