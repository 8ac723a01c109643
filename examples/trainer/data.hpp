#pragma once
// Training and evaluation data: a part of a stream of tokens, cut into batches. The label of a position is the next
// token, or nothing where the input token is the end of a text (SPEC §5).

#include <cmath>
#include <vector>

#include "options.hpp"
#include "ratplus/model/language_model.hpp"
#include "ratplus/ops/sample.hpp"

namespace trainer {

/// Tokens and labels of B sequences of T positions, in host memory.
struct host_batch {
  index_t batch = 0, rows = 0;
  std::vector<token_t> tokens, labels;  // (B, T)

  host_batch(index_t B, index_t T)
      : batch(B), rows(T), tokens(static_cast<std::size_t>(B * T)), labels(static_cast<std::size_t>(B * T)) {}

  /// Sequences [begin, end).
  [[nodiscard]] ratplus::token_batch sequences(index_t begin, index_t end) const {
    return {ratplus::as_view(tokens.data() + begin * rows, end - begin, rows),
            ratplus::as_view(labels.data() + begin * rows, end - begin, rows)};
  }
};

/// Tokens [begin, end) of a stream.
class token_range {
 public:
  token_range(const ratplus::io::token_stream& stream, index_t begin, index_t end, std::optional<token_t> end_of_text)
      : stream_(&stream), begin_(begin), end_(end), end_of_text_(end_of_text) {}

  [[nodiscard]] index_t size() const { return end_ - begin_; }

  /// Throws value_error, naming `what`, unless a sequence of T positions and its last label fit.
  void require(index_t T, const char* what) const {
    if (size() < T + 1)
      throw ratplus::value_error(
          ratplus::message(what, ": ", size(), " tokens, a sequence of ", T, " positions needs at least ", T + 1));
  }

  /// Sequence b of the batch: T positions from `position` of the range, and their labels.
  void read(index_t position, index_t b, host_batch& batch) const {
    std::vector<token_t> ids(static_cast<std::size_t>(batch.rows + 1));
    stream_->read(begin_ + position, batch.rows + 1, ids.data());
    for (index_t t = 0; t < batch.rows; ++t) {
      const auto at = static_cast<std::size_t>(t), to = static_cast<std::size_t>(b * batch.rows + t);
      batch.tokens[to] = ids[at];
      batch.labels[to] = end_of_text_ && ids[at] == *end_of_text_ ? ratplus::ignored_label : ids[at + 1];
    }
  }

  /// The batch of a training iteration: sequences from anywhere, chosen by (seed, iteration) alone, so that a run goes
  /// on exactly without a generator's state.
  [[nodiscard]] host_batch random(index_t B, index_t T, std::uint64_t seed, index_t iteration) const {
    host_batch batch(B, T);
    for (index_t b = 0; b < B; ++b) {
      const double u = ratplus::uniform(seed, static_cast<std::uint64_t>(b), static_cast<std::uint64_t>(iteration));
      read(static_cast<index_t>(u * static_cast<double>(size() - T)), b, batch);
    }
    return batch;
  }

 private:
  const ratplus::io::token_stream* stream_;
  index_t begin_, end_;
  std::optional<token_t> end_of_text_;
};

[[nodiscard]] inline ratplus::io::token_stream open_stream(const data_options& data, index_t vocab_size) {
  using ratplus::io::token_format;
  return {data.files, data.format.value_or(vocab_size == 256 ? token_format::bytes : token_format::uint16), vocab_size};
}

}  // namespace trainer
