// ops/core.cpp on CUDA: the same cases, and many rows.
#include "core.cpp"

// As many as a GPU has multiprocessors are decoded in another way.
TEMPLATE_TEST_CASE("core: many rows", "", RATPLUS_TEST_BACKENDS) {
  using T = typename TestType::scalar;
  TestType backend;
  for (const numbers& n : {numbers{1, 0, 0}, numbers{8, 6, 2}, numbers{4, 40, 0}, numbers{0, 7, 3}})
    check_core<T>(backend, gated_average{}, n.pattern(), 64, 64, prompt_and_steps);
  for (const index_t d : {24, 72, 128})
    check_core<T>(backend, gated_average{}, numbers{8, 6, 2}.pattern(), 64, d, prompt_and_steps);
  check_core<T>(backend, none{}, by_groups({{1, 0, 0}, {4, 3, 1}}), 64, 16, prompt_and_steps);
  check_core<T>(backend, gated_average{}, numbers{6, 3, 1}.pattern(), numbers{2, 9, 4}.pattern(), 64, 64,
                prompt_and_steps);
  check_core<bfloat16>(backend, gated_average{}, numbers{8, 6, 3}.pattern(), 64, 64, prompt_and_steps);
}
