// `logits` and `grads` against the reference cases: every schedule, in one pass and decoded after prefills of several
// lengths.

#include "support/compare.hpp"
#include "trainer/program.hpp"

using namespace ratplus_tests;
using ratplus::io::safetensors_file;

namespace {

/// Options of the device, and what SPEC §8 allows there. Of single gradients twice as much in bfloat16:
/// model/golden.cpp says why.
struct way {
  arguments options;
  double tolerance = 1e-5, of_one_gradient = 1e-5;
};
#if defined(__CUDACC__)
const std::vector<way> ways{{{"--device", "cuda", "--precision", "float32"}}, {{"--device", "cuda"}, 2e-2, 4e-2}};
std::vector<index_t> prefills(index_t) { return {-1, 13}; }  // a process on a GPU takes half a second to begin
#else
const std::vector<way> ways{{}};
std::vector<index_t> prefills(index_t T) { return {-1, 0, 1, 13, T - 1, T}; }
#endif

}  // namespace

TEST_CASE("logits of every schedule agree with the reference, decoded ones too") {
  const std::string name = GENERATE(as<std::string>{}, "golden", "golden-attention");
  const way how = GENERATE(from_range(ways));
  const scratch_folder scratch;
  make_golden_model(name, scratch / "model");
  const auto cases = safetensors_file::open(golden_file("cases-" + name));
  int schedules = 0;
  for (const std::string& tensor : cases.names()) {
    const std::string kind = "logits/";
    if (tensor.rfind(kind, 0) != 0) continue;
    ++schedules;
    for (const index_t prefill : prefills(cases.info("tokens").shape[1])) {
      arguments call{"logits",       "--model",   scratch / "model",          "--tokens",
                     cases.path(),   "--pattern", tensor.substr(kind.size()), "--out",
                     scratch / "out"};
      if (prefill >= 0) call = call + arguments{"--prefill", std::to_string(prefill)};
      trainer_output(call + how.options);
      const auto made = safetensors_file::open(scratch / "out");
      INFO(tensor << ", prefill " << prefill);
      CHECK(made.info("logits").shape == cases.info(tensor).shape);
      CHECK(made.info("logits").type == ratplus::io::dtype::f32);
      CHECK(difference(flat(made, "logits"), flat(cases, tensor)) <= how.tolerance);
    }
  }
  CHECK(schedules >= 5);
}

TEST_CASE("losses and gradients of every tensor agree with the reference") {
  const std::string name = GENERATE(as<std::string>{}, "golden", "golden-attention");
  const way how = GENERATE(from_range(ways));
  const scratch_folder scratch;
  make_golden_model(name, scratch / "model");
  const auto cases = safetensors_file::open(golden_file("cases-" + name));
  const auto parameters = safetensors_file::open(golden_file("model-" + name)).names();
  int schedules = 0;
  for (const std::string& tensor : cases.names()) {
    const std::string kind = "loss/";
    if (tensor.rfind(kind, 0) != 0) continue;
    ++schedules;
    const std::string schedule = tensor.substr(kind.size());
    trainer_output(arguments{"grads", "--model", scratch / "model", "--tokens", cases.path(), "--pattern", schedule,
                             "--out", scratch / "out"} +
                   how.options);
    const auto made = safetensors_file::open(scratch / "out");
    CHECK(made.names().size() == parameters.size() + 1);
    INFO(schedule);
    CHECK(difference(made.read<double, 1>("loss").data()[0], cases.read<double, 1>(tensor).data()[0]) <= how.tolerance);
    for (const std::string& parameter : parameters) {
      INFO(parameter);
      CHECK(difference(flat(made, "grad/" + parameter), flat(cases, "grad/" + schedule + "/" + parameter)) <=
            how.of_one_gradient);
    }
  }
  CHECK(schedules >= 2);
}

TEST_CASE("bfloat16 files, any order of tensors and the tied head are read") {
  const scratch_folder scratch;
  make_golden_model("golden", scratch / "half");
  make_golden_model("golden", scratch / "rounded");
  const auto source = safetensors_file::open(golden_file("model-golden"));
  std::vector<std::vector<bfloat16>> halves;
  std::vector<std::vector<float>> floats;
  for (const std::string& name : source.names()) {
    halves.push_back(source.read_flat<bfloat16>(name));
    floats.emplace_back(halves.back().begin(), halves.back().end());
  }
  ratplus::io::safetensors_writer half, rounded;
  const auto add = [&](const std::string& name, std::size_t i, const std::vector<index_t>& shape) {
    const auto add_as = [&](auto& writer, auto& values) {
      if (shape.size() == 2)
        writer.add(name, ratplus::as_view(values.data(), shape[0], shape[1]));
      else
        writer.add(name, ratplus::as_view(values.data(), shape[0]));
    };
    add_as(half, halves[i]);
    if (name != "head.lm_head.weight") add_as(rounded, floats[i]);
  };
  const auto names = source.names();
  for (std::size_t i = 0; i < names.size(); ++i) {
    add(names[i], i, source.info(names[i]).shape);
    if (names[i] == "embedding.wte.weight") add("head.lm_head.weight", i, source.info(names[i]).shape);
  }
  half.write(scratch / "half" + "/model.safetensors");
  rounded.write(scratch / "rounded" + "/model.safetensors");
  for (const std::string folder : {"half", "rounded"})
    trainer_output({"logits", "--model", scratch / folder, "--tokens", golden_file("cases-golden"), "--pattern",
                    "dilated:4", "--out", scratch / (folder + ".out")});
  CHECK(read_file(scratch / "half.out") == read_file(scratch / "rounded.out"));
}
