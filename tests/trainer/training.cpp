// Training runs as users make them: they learn, they go on exactly after any end, and they never damage what is saved.

#include <nlohmann/json.hpp>
#include <sstream>

#include "support/compare.hpp"
#include "trainer/program.hpp"

using namespace ratplus_tests;

namespace {

/// Text with something to learn.
std::string text() {
  std::string s;
  random_source source(7);
  const char* words[] = {"in the beginning ", "and it was so. ", "the waters ", "the earth\n", "and the light "};
  while (s.size() < 6000) s += words[source.below(5)];
  return s;
}

// On a device also sequences of several tiles of a scan, for runs that must repeat exactly.
#if defined(__CUDACC__)
const arguments device{"--device", "cuda"}, several_tiles{"--seq-len", "256"};
constexpr double rounding = 1e-2;
#else
const arguments device, several_tiles;
constexpr double rounding = 1e-4;
#endif

struct run_files {
  scratch_folder scratch;
  std::string data = scratch / "text", out = scratch / "out";
  run_files() { write_file(data, text()); }

  [[nodiscard]] arguments pretrain(const std::string& to, const arguments& more = {}) const {
    return arguments{"pretrain",  "--data",   data,   "--out",          scratch / to, "--d-model", "32", "--heads",
                     "2",         "--layers", "2",    "--seq-len",      "32",         "--batch",   "4",  "--sparse",
                     "dilated:8", "--lr",     "3e-3", "--report-every", "1000",       "--threads", "2"} +
           device + more;
  }
  [[nodiscard]] std::string file(const std::string& folder, const std::string& name) const {
    return scratch / folder + "/" + name;
  }
  [[nodiscard]] std::vector<nlohmann::json> log(const std::string& folder) const {
    std::vector<nlohmann::json> lines;
    std::istringstream in(read_file(file(folder, "log.jsonl")));
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  /// The log without the clock.
  [[nodiscard]] std::vector<nlohmann::json> learning(const std::string& folder) const {
    auto lines = log(folder);
    for (auto& line : lines) line.erase("seconds");
    return lines;
  }
  /// Lines of a log that is being written.
  [[nodiscard]] bool has_lines(const std::string& folder, std::ptrdiff_t lines) const {
    if (!std::filesystem::exists(file(folder, "log.jsonl"))) return false;
    const std::string all = read_file(file(folder, "log.jsonl"));
    return std::count(all.begin(), all.end(), '\n') >= lines;
  }
};

/// Long enough to be stopped under way; a sanitized program takes its time over each.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t long_run = 60;
#else
constexpr std::size_t long_run = 300;
#endif

}  // namespace

TEST_CASE("pretraining learns, writes a model that every command reads, and logs") {
  const run_files run;
  trainer_output(run.pretrain("joint", {"--iterations", "60", "--eval-every", "30"}));
  const auto log = run.log("joint");
  REQUIRE(log.size() == 62);  // 60 iterations, two evaluations
  for (const char* loss : {"loss", "sparse_loss"}) {
    CHECK(log.front()[loss].get<double>() > 5);  // log 256 = 5.5
    CHECK(log[60][loss].get<double>() < 3);
  }
  CHECK(log.back()["held_out_loss"]["dense"].get<double>() < 3);
  CHECK(log.back()["held_out_loss"].size() == 2);
  CHECK(difference(log.front()["lr"].get<double>(), 3e-3 / 3) <= 1e-12);  // 5 % of 60: three iterations of warm-up

  const std::string table =
      trainer_output(arguments{"eval", "--model", run.scratch / "joint", "--data", run.data, "--pattern", "dense",
                               "--pattern", "dilated:8+local:4+sinks:1", "--json", run.scratch / "table"} +
                     device);
  CHECK(says(table, "dilated:8+local:4+sinks:1"));
  const auto rows = nlohmann::json::parse(read_file(run.scratch / "table"));
  REQUIRE(rows.size() == 2);
  CHECK(rows[0]["tokens"].get<std::size_t>() == read_file(run.data).size() - 1);
  CHECK(rows[0]["keys_visited"].get<int>() == 2 * 2 * 32 * 33 / 2);
  CHECK(rows[1]["keys_visited"].get<int>() < rows[0]["keys_visited"].get<int>());
  CHECK(rows[1]["kv_cache_bytes"].get<int>() < rows[0]["kv_cache_bytes"].get<int>());
  const double loss = rows[0]["loss"].get<double>();
  CHECK(loss < 3);
  CHECK(difference(rows[0]["perplexity"].get<double>(), std::exp(loss)) <= 1e-12);
  CHECK(difference(rows[0]["bits_per_byte"].get<double>(), loss / std::log(2.0)) <= 1e-12);

  const arguments generate =
      arguments{"generate", "--model", run.scratch / "joint", "--prompt", "and ", "--tokens", "50"} + device;
  const std::string written = trainer_output(generate);
  CHECK(written.size() == 4 + 50 + 1);
  CHECK(written.rfind("and ", 0) == 0);
  CHECK(trainer_output(generate) == written);
  CHECK(trainer_output(generate + arguments{"--seed", "2"}) != written);

  trainer_output(arguments{"adapt", "--model", run.scratch / "joint", "--data", run.data, "--pattern",
                           "dilated:8+local:4", "--out", run.scratch / "adapted", "--iterations", "10", "--lr", "3e-4",
                           "--batch", "4"} +
                 device);
  CHECK(difference(run.log("adapted").front()["lr"].get<double>(), 3e-4) <= 1e-12);  // no warm-up
  CHECK(run.log("adapted").front()["loss"].get<double>() < 3);                       // from the pretrained weights
  CHECK(read_file(run.file("adapted", "config.json")) == read_file(run.file("joint", "config.json")));
}

TEST_CASE("the attention baseline trains under dense alone") {
  const run_files run;
  trainer_output(run.pretrain("attention", {"--no-recurrence", "--iterations", "5"}));
  CHECK(says(read_file(run.file("attention", "config.json")), "\"recurrence\": false"));
  CHECK_FALSE(run.log("attention").front().contains("sparse_loss"));
  trainer_output(run.pretrain("alone", {"--no-joint", "--iterations", "5"}));
  CHECK(says(read_file(run.file("alone", "config.json")), "\"recurrence\": true"));
  CHECK_FALSE(run.log("alone").front().contains("sparse_loss"));
}

TEST_CASE("a run is the same for every number of threads, nearly for every number of micro-batches, not for seeds") {
  const run_files run;
  const arguments few{"--iterations", "8", "--save-every", "3"};
  trainer_output(run.pretrain("two", few));
  trainer_output(run.pretrain("one", few + arguments{"--threads", "1"}));
  CHECK(run.learning("one") == run.learning("two"));
  CHECK(read_file(run.file("one", "training.safetensors")) == read_file(run.file("two", "training.safetensors")));
  trainer_output(run.pretrain("parts", few + arguments{"--micro-batches", "2"}));
  trainer_output(run.pretrain("seed", few + arguments{"--seed", "2"}));
  for (std::size_t i = 0; i < 8; ++i) {
    const double expected = run.log("two")[i]["loss"].get<double>();
    CHECK(difference(run.log("parts")[i]["loss"].get<double>(), expected) <= rounding);
    CHECK(run.log("seed")[i]["loss"].get<double>() != expected);
  }
}

TEST_CASE("a run that is interrupted or killed goes on exactly") {
  const run_files run;
  const arguments options =
      arguments{"--iterations", std::to_string(long_run), "--save-every", "7", "--eval-every", "50"} + several_tiles;
  trainer_output(run.pretrain("whole", options));

  const auto [name, signal, status] = GENERATE(
      table<const char*, int, int>({{"interrupted", SIGINT, 130}, {"ended", SIGTERM, 143}, {"killed", SIGKILL, 137}}));
  const std::string folder = name;
  const outcome stopped = run_trainer(run.pretrain(folder, options), signal, [&] { return run.has_lines(folder, 20); });
  INFO(stopped.err);
  CHECK(stopped.status == status);
  const std::size_t before = run.log(folder).size();
  CHECK(before < long_run);
  if (signal != SIGKILL) CHECK(says(stopped.err, "stopped after iteration"));

  trainer_output(run.pretrain(folder, options + arguments{"--resume"}));
  CHECK(run.learning(folder) == run.learning("whole"));
  for (const char* file : {"training.safetensors", "model.safetensors", "config.json"})
    CHECK(read_file(run.file(folder, file)) == read_file(run.file("whole", file)));
  trainer_output(run.pretrain(folder, options + arguments{"--resume"}));  // nothing is left to do
  CHECK(run.learning(folder) == run.learning("whole"));
}

TEST_CASE("an adaptation goes on exactly") {
  const run_files run;
  trainer_output(run.pretrain("model", several_tiles + arguments{"--iterations", "5"}));
  const auto adapt = [&](const std::string& to, const arguments& more) {
    return arguments{"adapt",
                     "--model",
                     run.scratch / "model",
                     "--data",
                     run.data,
                     "--pattern",
                     "local:4",
                     "--out",
                     run.scratch / to,
                     "--iterations",
                     std::to_string(long_run),
                     "--batch",
                     "4",
                     "--save-every",
                     "10"} +
           device + more;
  };
  trainer_output(adapt("whole", {}));
  const outcome stopped = run_trainer(adapt("cut", {}), SIGINT, [&] { return run.has_lines("cut", 15); });
  CHECK(stopped.status == 130);
  trainer_output(adapt("cut", {"--resume"}));
  CHECK(run.learning("cut") == run.learning("whole"));
  CHECK(read_file(run.file("cut", "model.safetensors")) == read_file(run.file("whole", "model.safetensors")));
}

TEST_CASE("a loss that is not finite ends the run and names the last good checkpoint") {
  const run_files run;
  const arguments wild{"--lr", "1e30", "--iterations", "50", "--warmup", "0"};
  const std::string first = trainer_error(run.pretrain("first", wild));
  CHECK(says(first, "iteration 1: training step 2: loss is "));
  CHECK(says(first, "no checkpoint had been saved"));

  const arguments growing = wild + arguments{"--no-joint", "--save-every", "1"};
  const std::string message = trainer_error(run.pretrain("growing", growing));
  CHECK(says(message, "loss is "));
  CHECK(
      says(message, "the last good checkpoint is " + run.file("growing", "training.safetensors") + ", of iteration "));
  const std::string saved = read_file(run.file("growing", "training.safetensors"));
  CHECK(trainer_error(run.pretrain("growing", growing + arguments{"--resume"})) == message);
  CHECK(read_file(run.file("growing", "training.safetensors")) == saved);
}

TEST_CASE("a label after the end of a text is not trained on") {
  const run_files run;
  // Alternating ids 1 0 1 0 …: with 1 as the end of text only "1 after 0" counts, which is always right.
  std::string ids;
  for (int i = 0; i < 2000; ++i) ids += std::string(i % 2 == 0 ? "\1\0" : "\0\0", 2);
  write_file(run.data, ids);
  const arguments tokens{"--vocab-size", "5", "--format", "uint16", "--iterations", "20", "--held-out", "0"};
  trainer_output(run.pretrain("model", tokens + arguments{"--end-of-text", "1"}));
  trainer_output(arguments{"eval", "--model", run.scratch / "model", "--data", run.data, "--pattern", "dense", "--json",
                           run.scratch / "table"} +
                 device);
  const auto rows = nlohmann::json::parse(read_file(run.scratch / "table"));
  CHECK(rows[0]["tokens"].get<int>() == 999);  // of 1999 predictions
  CHECK(rows[0]["bits_per_byte"].is_null());
}
