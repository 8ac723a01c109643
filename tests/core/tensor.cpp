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
