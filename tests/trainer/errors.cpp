// What goes wrong: one line, exit status 1 (2 for a wrong command line), and nothing saved is touched.

#include "trainer/program.hpp"

using namespace ratplus_tests;

namespace {

struct folders {
  scratch_folder scratch;
  std::string data = scratch / "data", model = scratch / "model", cases = golden_file("cases-golden");

  folders() {
    write_file(data, std::string(500, 'a'));
    make_golden_model("golden", model);
  }
  [[nodiscard]] arguments pretrain(const arguments& more = {}) const {
    return arguments{
               "pretrain", "--data", data,        "--out", scratch / "out", "--d-model", "16",           "--heads", "2",
               "--layers", "1",      "--seq-len", "16",    "--batch",       "2",         "--iterations", "2"} +
           more;
  }
  [[nodiscard]] arguments logits(const arguments& more = {}) const {
    return arguments{"logits", "--model", model, "--tokens", cases, "--pattern", "dense", "--out", scratch / "file"} +
           more;
  }
};

}  // namespace

TEST_CASE("a wrong command line ends with status 2") {
  const folders f;
  CHECK(says(trainer_error({}, 2), "subcommand"));
  CHECK(says(trainer_error({"train"}, 2), "'train' is no command"));
  CHECK(says(trainer_error({"pretrain"}, 2), "--data"));
  CHECK(says(trainer_error(f.pretrain({"--sparse", "dilated:0"}), 2), "--sparse: pattern 'dilated:0'"));
  CHECK(says(trainer_error(f.pretrain({"--lr", "nan"}), 2), "--lr: nan"));
  CHECK(says(trainer_error(f.pretrain({"--lr", "-1"}), 2), "--lr: -1"));
  CHECK(says(trainer_error(f.pretrain({"--warmup", "1.5"}), 2), "--warmup: 1.5"));
  CHECK(says(trainer_error(f.pretrain({"--iterations", "0"}), 2), "--iterations: 0"));
  CHECK(says(trainer_error(f.pretrain({"--iterations", "99999999999"}), 2), "--iterations: 99999999999"));
  CHECK(says(trainer_error(f.pretrain({"--iterations", "2.5"}), 2), "--iterations"));
  CHECK(says(trainer_error(f.pretrain({"--micro-batches", "3"}), 2), "3 parts do not divide a batch of 2"));
  CHECK(says(trainer_error(f.pretrain({"--heads", "3"}), 2), "num_heads is 3, must divide d_model, 16"));
  CHECK(says(trainer_error(f.pretrain({"--device", "gpu"}), 2), "'gpu' is none of cpu, cuda"));
  CHECK(says(trainer_error(f.pretrain({"--end-of-text", "256"}), 2), "ignore_token is 256"));
  CHECK(says(trainer_error(f.pretrain({"--loud"}), 2), "--loud"));
  CHECK(says(trainer_error(f.pretrain({"--recurrence", "lstm"}), 2), "no cell is named 'lstm'"));
  CHECK(says(trainer_error(f.logits({"--prefill", "-1"}), 2), "--prefill: -1"));
  CHECK(says(trainer_error({"generate", "--model", f.model}, 2), "--prompt"));
  CHECK(f.scratch.files() == std::vector<std::string>{"data", "model"});
}

TEST_CASE("what the machine or the build cannot do is said") {
  const folders f;
  CHECK(says(trainer_error(f.pretrain({"--precision", "bfloat16"})), "--precision"));
  CHECK(says(trainer_error({"generate", "--model", f.model, "--prompt", "a"}), "has 61 tokens"));
  CHECK(f.scratch.files() == std::vector<std::string>{"data", "model"});
}

TEST_CASE("bad data is refused before anything is made") {
  const folders f;
  CHECK(says(trainer_error(f.pretrain({"--data", f.scratch / "none"})), (f.scratch / "none") + ": cannot open"));
  CHECK(says(trainer_error(f.pretrain({"--data", f.scratch.path()})), f.scratch.path() + ": "));
  write_file(f.data, "");
  CHECK(says(trainer_error(f.pretrain()), f.data + ": no data, the file is empty"));
  write_file(f.data, "short");
  CHECK(says(trainer_error(f.pretrain()), "--data: 5 tokens, a sequence of 16 positions needs at least 17"));
  write_file(f.data, std::string(501, 'a'));
  CHECK(says(trainer_error(f.pretrain({"--format", "uint16"})), "not a whole number of 2-byte token ids"));
  CHECK(f.scratch.files() == std::vector<std::string>{"data", "model"});
  // Ids are read while training: the run ends and has said which.
  write_file(f.data, std::string(500, 'a'));
  CHECK(says(trainer_error(f.pretrain({"--vocab-size", "90", "--format", "bytes"})), "is 97, the vocabulary has 90"));
  CHECK(says(trainer_error({"eval", "--model", f.model, "--data", f.data, "--format", "bytes", "--pattern", "dense"}),
             "is 97, the vocabulary has 61"));
}

TEST_CASE("token files of logits and grads are checked") {
  const folders f;
  const auto with = [&](const std::vector<token_t>& ids, const char* name, index_t B, index_t T) {
    ratplus::io::safetensors_writer out;
    out.add(name, ratplus::as_view(ids.data(), B, T));
    out.write(f.scratch / "ids");
    return f.logits({"--tokens", f.scratch / "ids"});
  };
  CHECK(says(trainer_error(with({1, 61}, "tokens", 1, 2)), "id 61 at (0, 1) is outside the vocabulary of 61"));
  CHECK(says(trainer_error(with({1, -1}, "tokens", 1, 2)), "id -1"));
  CHECK(says(trainer_error(with({1, 2}, "token", 1, 2)), "has no tensor 'tokens'"));
  CHECK(says(trainer_error(with({}, "tokens", 0, 2)), "tokens: shape (0, 2) is empty"));
  CHECK(says(trainer_error(f.logits({"--prefill", "49"})), "--prefill: 49 positions"));
  CHECK(says(trainer_error(f.logits({"--pattern", "[dense|dense|dense]"})), "3 patterns do not divide 4 heads"));
  CHECK_FALSE(std::filesystem::exists(f.scratch / "file"));
  CHECK(says(trainer_error(f.logits({"--out", f.scratch / "no/such/folder"})), "no/such/folder: cannot write"));
  CHECK(says(trainer_error({"grads", "--model", f.model, "--tokens", f.scratch / "ids", "--pattern", "dense", "--out",
                            f.scratch / "file"}),
             "has no tensor 'labels'"));
}

TEST_CASE("a model folder is checked before a model is made") {
  const folders f;
  const std::string config = ratplus::io::config_path(f.model), weights = ratplus::io::model_path(f.model);
  const std::string good_config = read_file(config), good_weights = read_file(weights);
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string text = good_config;
    const auto at = text.find(from);
    REQUIRE(at != std::string::npos);
    write_file(config, text.replace(at, from.size(), to));
    return trainer_error(f.logits());
  };
  // Terabytes if they were allocated.
  CHECK(says(edited("\"d_model\": 32", "\"d_model\": 262144"),
             "tensor 'embedding.wte.weight': shape is (61, 32), expected (61, 262144)"));
  CHECK(says(edited("\"num_layers\": 3", "\"num_layers\": 65536"), "tensor 'backbone.layers.3.seq_layer."));
  CHECK(says(edited("\"num_layers\": 3", "\"num_layers\": 2"), "is not part of the model"));
  CHECK(says(edited("\"recurrence\": true", "\"recurrence\": false"), "expected (128, 32)"));
  CHECK(says(edited("\"num_heads\": 4", "\"num_heads\": 5"), "num_heads is 5"));
  CHECK(says(edited("\"d_ffn\": 128", "\"d_ffn\": \"many\""), "d_ffn"));
  CHECK(says(edited("{", "["), config));
  write_file(config, good_config);
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{7}, std::size_t{100}, good_weights.size() - 1}) {
    write_file(weights, good_weights.substr(0, bytes));
    CHECK(says(trainer_error(f.logits()), weights + ": "));
  }
  std::filesystem::remove(weights);
  CHECK(says(trainer_error(f.logits()), weights + ": cannot open"));
  write_file(weights, good_weights);
  trainer_output(f.logits());
}

TEST_CASE("nothing that is saved is written over by mistake") {
  const folders f;
  const std::string out = f.scratch / "out";
  trainer_output(f.pretrain());
  const auto saved = [&] {
    return read_file(out + "/training.safetensors") + read_file(out + "/model.safetensors") +
           read_file(out + "/config.json") + read_file(out + "/log.jsonl");
  };
  const std::string before = saved();
  CHECK(says(trainer_error(f.pretrain()), out + "/model.safetensors: exists already"));
  CHECK(says(trainer_error({"adapt", "--model", out, "--data", f.data, "--pattern", "dense", "--out", out}),
             "exists already"));
  CHECK(says(trainer_error(f.pretrain({"--resume", "--lr", "0.5"})), "--lr 0.0008, now it is 0.5"));
  CHECK(says(trainer_error(f.pretrain({"--resume", "--no-joint"})), "--joint"));
  CHECK(says(trainer_error(f.pretrain({"--resume", "--layers", "2"})), "is of another model"));
  write_file(f.data, std::string(600, 'a'));
  CHECK(says(trainer_error(f.pretrain({"--resume"})), "data, in tokens"));
  CHECK(saved() == before);
}

TEST_CASE("a checkpoint that is damaged or missing is refused and stays as it is") {
  const folders f;
  const std::string checkpoint = f.scratch / "out" + "/training.safetensors";
  CHECK(says(trainer_error(f.pretrain({"--resume"})), checkpoint + ": cannot open"));
  trainer_output(f.pretrain());
  const std::string good = read_file(checkpoint);
  write_file(checkpoint, good.substr(0, good.size() / 2));
  CHECK(says(trainer_error(f.pretrain({"--resume"})), checkpoint + ": "));
  CHECK(read_file(checkpoint) == good.substr(0, good.size() / 2));
  std::filesystem::remove(checkpoint);
  std::filesystem::copy_file(f.scratch / "out" + "/model.safetensors", checkpoint);
  CHECK(says(trainer_error(f.pretrain({"--resume"})), "not a training checkpoint"));
}

TEST_CASE("folders that cannot be written end the run before it begins") {
  const folders f;
  write_file(f.scratch / "file", "a file");
  CHECK(says(trainer_error(f.pretrain({"--out", f.scratch / "file"})), f.scratch / "file"));
  CHECK(says(trainer_error(f.pretrain({"--out", f.scratch / "file/out"})), f.scratch / "file/out"));
  CHECK(says(trainer_error(f.pretrain({"--out", "/proc/ratplus"})), "/proc/ratplus: cannot"));
  CHECK(read_file(f.scratch / "file") == "a file");
}
