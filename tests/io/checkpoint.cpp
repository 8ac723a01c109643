// Model folders and training checkpoints: what is written is read back bit for bit, the run goes on exactly, and a file
// that does not fit its config is refused with the tensor, the expected and the found shape.

#include "ratplus/io/checkpoint.hpp"

#include "ratplus/backend/reference/backend.hpp"
#include "ratplus/pattern/names.hpp"
#include "ratplus/recurrence/by_name.hpp"
#include "ratplus/train/joint_step.hpp"
#include "support/array.hpp"
#include "support/catch.hpp"
#include "support/scratch.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

model_config small_config(const std::string& recurrence = "gated_average") {
  return {.vocab_size = 11,
          .d_model = 8,
          .num_heads = 2,
          .num_layers = 2,
          .d_ffn = 12,
          .recurrence = recurrence,
          .max_seq_len = 16};
}

template <class T>
std::vector<T> values(view<const T, 1> x) {
  return {x.data(), x.data() + x.size()};
}

/// The tensors of a small model's file, to be changed and written again.
struct file_parts {
  std::map<std::string, std::pair<std::vector<index_t>, std::vector<float>>> tensors;

  file_parts() {
    const parameter_layout layout(small_config(), true);
    for (const auto& e : layout.entries())
      tensors[e.name] = {e.shape, std::vector<float>(static_cast<std::size_t>(e.size()), 0.5f)};
  }
  void write(const std::string& folder) const {
    io::safetensors_writer writer;
    for (const auto& [name, tensor] : tensors) {
      const auto& [shape, data] = tensor;
      if (shape.size() == 1)
        writer.add(name, as_view(data.data(), shape[0]));
      else
        writer.add(name, as_view(data.data(), shape[0], shape[1]));
    }
    std::filesystem::create_directories(folder);
    io::write_config(io::config_path(folder), small_config());
    writer.write(io::model_path(folder));
  }
};

}  // namespace

TEMPLATE_TEST_CASE("checkpoint: a model is read back bit for bit", "", float, double) {
  reference::context ctx;
  const std::string recurrence = GENERATE("gated_average", "none", "chunked:4");
  const scratch_folder scratch;
  visit_cell(recurrence, [&](const auto& cell) {
    using Model = language_model<std::decay_t<decltype(cell)>, TestType>;
    Model model(ctx, small_config(recurrence), cell), again(ctx, small_config(recurrence), cell);
    model.initialise(ctx, 3);
    io::save_model(ctx, scratch / "new/folder", model);
    const io::model_source source = io::open_model(scratch / "new/folder");
    CHECK(source.config == model.config());
    io::load_model(ctx, source, again);
    CHECK(values(std::as_const(model).parameters()) == values(std::as_const(again).parameters()));
  });
}

TEST_CASE("checkpoint: a training run goes on exactly") {
  reference::context ctx;
  const scratch_folder scratch;
  using Model = language_model<gated_average>;
  const auto ids = random_tokens(2 * 8, 11, 5);
  const token_batch batch{as_view(ids.data.data(), 2, 8), as_view(ids.data.data(), 2, 8)};
  const std::vector<token_batch> batches{batch};

  Model model(ctx, small_config());
  model.initialise(ctx, 1);
  training<Model> run(ctx, model);
  for (int i = 0; i < 3; ++i) run.joint_step(ctx, dilated<4>{}, batches, 1e-2);
  io::save_training(ctx, scratch / "run", model, run, 3, "options of mine");
  const auto expected = run.joint_step(ctx, dilated<4>{}, batches, 1e-2);

  const io::training_source source = io::open_training(scratch / "run");
  CHECK(source.config == model.config());
  CHECK(source.iteration == 3);
  CHECK(source.optimizer_steps == 6);
  CHECK(source.options == "options of mine");
  Model other(ctx, source.config);
  training<Model> other_run(ctx, other);
  io::load_training(ctx, source, other, other_run);
  const auto got = other_run.joint_step(ctx, dilated<4>{}, batches, 1e-2);
  CHECK(got.sparse.loss == expected.sparse.loss);
  CHECK(got.dense.loss == expected.dense.loss);
  CHECK(got.dense.grad_norm == expected.dense.grad_norm);
  CHECK(values(std::as_const(model).parameters()) == values(std::as_const(other).parameters()));
}

TEST_CASE("checkpoint: a file that does not fit its config is refused") {
  const scratch_folder scratch;
  const std::string folder = scratch / "model", file = io::model_path(folder) + ": tensor ";
  const auto refused = [&](const file_parts& parts) {
    parts.write(folder);
    return message_of<format_error>([&] { (void)io::open_model(folder); });
  };
  const std::string fc1 = "backbone.layers.1.hidden_layer.fc1.weight";

  file_parts parts;
  parts.write(folder);
  CHECK_NOTHROW(io::open_model(folder));
  parts.tensors.erase(fc1);
  CHECK(refused(parts) == file + "'" + fc1 + "': is missing, expected with shape (12, 8)");
  parts.tensors[fc1] = {{8, 12}, std::vector<float>(96)};
  CHECK(refused(parts) == file + "'" + fc1 + "': shape is (8, 12), expected (12, 8)");
  parts.tensors[fc1] = {{96}, std::vector<float>(96)};
  CHECK(refused(parts) == file + "'" + fc1 + "': shape is (96), expected (12, 8)");

  parts = {};
  parts.tensors["backbone.layers.2.hidden_layer.ln.weight"] = {{8}, std::vector<float>(8)};
  CHECK(refused(parts) == file +
                              "'backbone.layers.2.hidden_layer.ln.weight': is not part of the model that the config "
                              "describes");
  parts = {};
  parts.tensors["head.lm_head.weight"] = {{11, 8}, std::vector<float>(88)};
  parts.write(folder);
  CHECK_NOTHROW(io::open_model(folder));
  parts.tensors["head.lm_head.weight"] = {{10, 8}, std::vector<float>(80)};
  CHECK(refused(parts) == file + "'head.lm_head.weight': shape is (10, 8), expected (11, 8)");
}

TEST_CASE("checkpoint: integers are no parameters, and a model is no training checkpoint") {
  const scratch_folder scratch;
  const std::string folder = scratch / "model";
  file_parts().write(folder);
  CHECK_THROWS_WITH(io::open_training(io::model_path(folder)),
                    contains("not a training checkpoint, its metadata has no config"));
  const auto source = io::safetensors_file::open(io::model_path(folder));
  const std::vector<std::int32_t> integers(8, 1);
  io::safetensors_writer writer;
  std::vector<tensor<float, 2>> matrices;
  std::vector<tensor<float, 1>> vectors;
  for (const std::string& name : source.names())
    if (source.info(name).shape.size() == 2)
      matrices.push_back(source.read<float, 2>(name));
    else
      vectors.push_back(source.read<float, 1>(name));
  std::size_t matrix = 0, vector = 0;
  for (const std::string& name : source.names())
    if (source.info(name).shape.size() == 2)
      writer.add(name, matrices[matrix++]);
    else if (name == "backbone.ln.weight")
      writer.add(name, as_view(integers.data(), 8)), ++vector;
    else
      writer.add(name, vectors[vector++]);
  writer.write(io::model_path(folder));
  CHECK_THROWS_WITH(io::open_model(folder), contains("'backbone.ln.weight': dtype is I32, expected F32 or BF16"));
}
