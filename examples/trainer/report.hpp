#pragma once
// What a run says: DIR/log.jsonl, one JSON object a line; progress on standard error; tables; and its options as text.

#include <chrono>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "options.hpp"

namespace trainer {

using named_numbers = std::vector<std::pair<std::string, double>>;

/// log.jsonl of a run: a line for every iteration and every evaluation.
class run_log {
 public:
  /// Keeps the lines up to `iteration` of an earlier run and goes on after them; 0 starts anew.
  run_log(const std::string& path, index_t iteration);

  /// Throws io_error when the line cannot be written.
  void iteration(index_t i, const named_numbers& values);
  void evaluation(index_t i, const named_numbers& losses);

 private:
  void line(const std::string& text);

  std::string path_;
  std::ofstream out_;
};

/// One line that is rewritten, on a terminal; else a line now and then.
class progress {
 public:
  progress(index_t first, index_t iterations, index_t tokens_per_iteration, index_t report_every);
  ~progress() { finish_line(); }

  /// Iteration i (from 0) is done.
  void step(index_t i, const std::string& losses);
  /// A line that stays.
  void say(const std::string& text);

  /// Time spent elsewhere does not count for the speed.
  void pause() { paused_ = clock::now(); }
  void resume() { started_ += clock::now() - paused_; }

 private:
  using clock = std::chrono::steady_clock;
  void finish_line();

  index_t first_, iterations_, tokens_, report_every_;
  bool terminal_, open_line_ = false;
  clock::time_point started_ = clock::now(), paused_ = started_;
};

/// SIGINT and SIGTERM ask a run to save and stop; a second one ends it at once.
void catch_stop_signals();
/// The signal that asked, 0 when none did.
[[nodiscard]] int stop_signal();

/// What must be the same when a run goes on, as JSON text.
[[nodiscard]] std::string options_text(const pretrain_options& o, index_t data_tokens);
[[nodiscard]] std::string options_text(const adapt_options& o, index_t data_tokens);
/// Throws value_error naming the first option in which the two texts differ.
void check_same_options(const std::string& path, const std::string& saved, const std::string& given);

/// A line of the table of `eval`.
struct eval_row {
  std::string pattern;
  double loss = 0, perplexity = 0, bits_per_byte = 0;                        // bits per byte: NaN when unknown
  index_t tokens = 0, keys_visited = 0, keys_dense = 0, kv_cache_bytes = 0;  // the last three: of one sequence
};
void print_table(const std::vector<eval_row>& rows, index_t seq_len, const std::string& json_file);

}  // namespace trainer
