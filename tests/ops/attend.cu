// ops/attend.cpp on CUDA: the same cases.
#include "attend.cpp"

TEMPLATE_TEST_CASE("attend: heads of more than 256 channels are refused", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  auto x = make_tensor<T, ratplus::cuda::space>(1, 2, 3, 264), y = make_tensor<T, ratplus::cuda::space>(1, 2, 3, 264);
  const view<const T, 4> rows = std::as_const(x).view();  // (B, H, T, d)
  attend_forward_args<T> forward;
  forward.q = forward.k = forward.v = rows, forward.out = y.view();
  CHECK_THROWS_WITH(attend_forward(backend.ctx, dilated<2>{}, forward),
                    contains("attend: head size 264") && contains("256"));
}
