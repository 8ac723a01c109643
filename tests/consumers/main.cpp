// What a stranger might write first: a model that is trained a little jointly, then read under a sparse pattern and
// decoded.
#ifdef SINGLE_FILE
#include "ratplus_single.hpp"
#else
#include <ratplus/ratplus.hpp>
#endif

#include <iostream>

int main() {
  using namespace ratplus;
  cpu::context cpu;
  const model_config config{
      .vocab_size = 8, .d_model = 16, .num_heads = 2, .num_layers = 2, .d_ffn = 64, .max_seq_len = 32};
  language_model<gated_average> model(cpu, config);
  model.initialise(cpu, 1);

  std::vector<token_t> ids(33);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<token_t>(i % 5);
  const token_batch batch{as_view(ids.data(), 1, 32), as_view(ids.data() + 1, 1, 32)};
  training trainer(cpu, model);
  double first = 0, last = 0;
  for (int i = 0; i < 40; ++i) {
    last = trainer.joint_step(cpu, dilated<4>{}, std::span(&batch, 1), 1e-2).sparse.loss;
    if (i == 0) first = last;
  }

  kv_cache<float> cache(cpu, config, dilated<4>{}, 1, 32);
  const auto made = generate(cpu, model, dilated<4>{}, cache, {{0, 1, 2, 3, 4, 0, 1, 2}}, {.tokens = 4});
  std::cout << "sparse loss " << first << " -> " << last << ", after 0 1 2 3 4 0 1 2 comes";
  for (const token_t id : made[0]) std::cout << ' ' << id;
  std::cout << '\n';
  return last < first / 2 ? 0 : 1;
}
