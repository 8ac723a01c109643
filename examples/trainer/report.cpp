#include "report.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "ratplus/io/atomic.hpp"

namespace trainer {

using nlohmann::ordered_json;

// ---- log.jsonl

run_log::run_log(const std::string& path, index_t iteration) : path_(path) {
  std::string kept;
  if (iteration > 0) {
    std::ifstream earlier(path);
    for (std::string text; std::getline(earlier, text);) {
      const auto entry = ordered_json::parse(text, nullptr, false);  // a killed run may leave half a line
      if (entry.is_object() && entry.value("iteration", index_t{0}) <= iteration) kept += text + "\n";
    }
  }
  ratplus::io::write_atomically(path, kept);
  out_.open(path, std::ios::app);
  if (!out_) throw ratplus::io_error(ratplus::message(path, ": cannot write"));
}

void run_log::line(const std::string& text) {
  out_ << text << '\n' << std::flush;
  if (!out_) throw ratplus::io_error(ratplus::message(path_, ": cannot write"));
}

void run_log::iteration(index_t i, const named_numbers& values) {
  ordered_json entry = {{"iteration", i}};
  for (const auto& [name, value] : values) entry[name] = value;
  line(entry.dump());
}

void run_log::evaluation(index_t i, const named_numbers& losses) {
  ordered_json entry = {{"iteration", i}, {"held_out_loss", ordered_json::object()}};
  for (const auto& [name, value] : losses) entry["held_out_loss"][name] = value;
  line(entry.dump());
}

// ---- progress

namespace {

std::string printed(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string duration(double seconds) {
  const auto s = static_cast<long long>(std::lround(seconds));
  if (s < 60) return std::to_string(s) + " s";
  if (s < 3600) return std::to_string(s / 60) + " min " + std::to_string(s % 60) + " s";
  return std::to_string(s / 3600) + " h " + std::to_string(s % 3600 / 60) + " min";
}

}  // namespace

progress::progress(index_t first, index_t iterations, index_t tokens_per_iteration, index_t report_every)
    : first_(first),
      iterations_(iterations),
      tokens_(tokens_per_iteration),
      report_every_(report_every),
      terminal_(::isatty(STDERR_FILENO) == 1) {}

void progress::step(index_t i, const std::string& losses) {
  const index_t done = i + 1;
  if (!terminal_ && done % report_every_ != 0 && done != iterations_) return;
  const double seconds = std::chrono::duration<double>(clock::now() - started_).count();
  const double per_iteration = seconds / static_cast<double>(done - first_);
  const std::string text =
      ratplus::message("iteration ", done, "/", iterations_, "  ", losses, "  ",
                       printed("%.0f", per_iteration > 0 ? static_cast<double>(tokens_) / per_iteration : 0),
                       " tokens/s  ", duration(per_iteration * static_cast<double>(iterations_ - done)), " left");
  if (terminal_)
    std::cerr << '\r' << text << "\033[K" << std::flush;
  else
    std::cerr << text << std::endl;
  open_line_ = terminal_;
}

void progress::say(const std::string& text) {
  finish_line();
  std::cerr << text << std::endl;
}

void progress::finish_line() {
  if (open_line_) std::cerr << std::endl;
  open_line_ = false;
}

// ---- signals

namespace {
volatile std::sig_atomic_t caught_signal = 0;
}  // namespace

void catch_stop_signals() {
  struct ::sigaction action = {};
  action.sa_handler = [](int signal) { caught_signal = signal; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

int stop_signal() { return caught_signal; }

// ---- options of a run

namespace {

ordered_json common_options(const training_options& t, index_t data_tokens) {
  return {{"data, in tokens", data_tokens},
          {"--iterations", t.iterations},
          {"--batch", t.batch},
          {"--micro-batches", t.micro_batches},
          {"--seq-len", t.seq_len},
          {"--lr", t.lr},
          {"--min-lr", t.eta_min},
          {"--warmup", t.warmup},
          {"--beta1", t.beta1},
          {"--beta2", t.beta2},
          {"--epsilon", t.epsilon},
          {"--weight-decay", t.weight_decay},
          {"--clip", t.clip},
          {"--seed", t.seed}};
}

}  // namespace

std::string options_text(const pretrain_options& o, index_t data_tokens) {
  ordered_json all = common_options(o.training, data_tokens);
  all["command"] = "pretrain";
  all["--joint"] = o.joint;
  if (o.joint) all["--sparse"] = o.sparse.name;
  return all.dump();
}

std::string options_text(const adapt_options& o, index_t data_tokens) {
  ordered_json all = common_options(o.training, data_tokens);
  all["command"] = "adapt";
  all["--pattern"] = o.pattern.name;
  return all.dump();
}

void check_same_options(const std::string& path, const std::string& saved, const std::string& given) {
  const ordered_json before = ordered_json::parse(saved, nullptr, false), now = ordered_json::parse(given);
  if (!before.is_object()) throw ratplus::format_error(ratplus::message(path, ": its options are not readable"));
  const auto differ = [&](const std::string& name, const std::string& had, const std::string& has) {
    throw ratplus::value_error(ratplus::message(path, ": the run was started with ", name, " ", had, ", now it is ",
                                                has, "; --resume goes on with the same options only"));
  };
  for (const auto& [name, value] : now.items()) {
    const auto found = before.find(name);
    if (found == before.end()) differ(name, "absent", value.dump());
    if (*found != value) differ(name, found->dump(), value.dump());
  }
  for (const auto& [name, value] : before.items())
    if (!now.contains(name)) differ(name, value.dump(), "absent");
}

// ---- eval

void print_table(const std::vector<eval_row>& rows, index_t seq_len, const std::string& json_file) {
  std::size_t width = std::string("pattern").size();
  for (const eval_row& row : rows) width = std::max(width, row.pattern.size());
  const auto line = [&](const std::string& pattern, const std::string& loss, const std::string& perplexity,
                        const std::string& bits, const std::string& keys, const std::string& bytes) {
    std::printf("%-*s  %8s  %10s  %9s  %22s  %12s\n", static_cast<int>(width), pattern.c_str(), loss.c_str(),
                perplexity.c_str(), bits.c_str(), keys.c_str(), bytes.c_str());
  };
  line("pattern", "loss", "perplexity", "bits/byte", "keys visited", "KV bytes");
  ordered_json table = ordered_json::array();
  for (const eval_row& row : rows) {
    const bool bits_known = std::isfinite(row.bits_per_byte);
    const double share = 100 * static_cast<double>(row.keys_visited) / static_cast<double>(row.keys_dense);
    line(row.pattern, printed("%.4f", row.loss), printed("%.4g", row.perplexity),
         bits_known ? printed("%.4f", row.bits_per_byte) : "unknown",
         std::to_string(row.keys_visited) + printed(" (%.2f %%)", share), std::to_string(row.kv_cache_bytes));
    ordered_json entry = {{"pattern", row.pattern},
                          {"loss", row.loss},
                          {"perplexity", row.perplexity},
                          {"bits_per_byte", nullptr},
                          {"tokens", row.tokens},
                          {"seq_len", seq_len},
                          {"keys_visited", row.keys_visited},
                          {"keys_visited_dense", row.keys_dense},
                          {"kv_cache_bytes", row.kv_cache_bytes}};
    if (bits_known) entry["bits_per_byte"] = row.bits_per_byte;
    table.push_back(std::move(entry));
  }
  if (std::fflush(stdout) != 0) throw ratplus::io_error("standard output: cannot write");
  if (!json_file.empty()) ratplus::io::write_atomically(json_file, table.dump(2) + "\n");
}

}  // namespace trainer
