#pragma once
// Training and evaluation data as one long stream of token ids: the concatenation of files, each mapped and never
// copied. A file is either any bytes at all (text, UTF-8 or not: ids are the 256 bytes) or a flat array of
// little-endian uint16 or uint32 ids, the published format. Ids are checked when they are read, since checking a whole
// corpus first would read all of it.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "ratplus/core/error.hpp"
#include "ratplus/core/index.hpp"
#include "ratplus/io/mapped_file.hpp"

namespace ratplus::io {

static_assert(std::endian::native == std::endian::little, "ratplus/io: files are little-endian and mapped as they are");

enum class token_format : int { bytes = 1, uint16 = 2, uint32 = 4 };  // bytes per id

class token_stream {
 public:
  /// Maps the files, in order. Throws io_error when one cannot be opened, format_error when one is empty or not a whole
  /// number of ids, value_error when no file is given or `vocab_size` is no vocabulary.
  token_stream(const std::vector<std::string>& paths, token_format format, index_t vocab_size)
      : format_(format), vocab_size_(vocab_size) {
    if (vocab_size < 1 || vocab_size > std::numeric_limits<token_t>::max())
      throw value_error(message("tokens: vocab_size is ", vocab_size, ", must be positive and fit a token id"));
    if (paths.empty()) throw value_error("tokens: no data file given");
    const auto width = static_cast<std::size_t>(format);
    for (const std::string& path : paths) {
      const mapped_file& file = files_.emplace_back(path);
      if (file.size() == 0) throw format_error(message(path, ": no data, the file is empty"));
      if (file.size() % width != 0)
        throw format_error(
            message(path, ": ", file.size(), " bytes, not a whole number of ", width, "-byte token ids"));
      starts_.push_back(starts_.back() + static_cast<index_t>(file.size() / width));
    }
  }

  /// Ids in all files together.
  [[nodiscard]] index_t size() const { return starts_.back(); }
  [[nodiscard]] index_t vocab_size() const { return vocab_size_; }

  /// Copies ids [position, position + count) to `out`, across the seams of files. Throws value_error when the range is
  /// not within the stream or when an id is not in the vocabulary (naming file and index).
  void read(index_t position, index_t count, token_t* out) const {
    if (position < 0 || count < 0 || count > size() || position > size() - count)
      throw value_error(message("tokens: ", count, " ids at ", position, " asked of a stream of ", size()));
    auto file =
        static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin()) - 1;
    while (count > 0) {
      const index_t first = position - starts_[file], here = std::min(count, starts_[file + 1] - position);
      switch (format_) {
        case token_format::bytes:
          copy<std::uint8_t>(files_[file], first, here, out);
          break;
        case token_format::uint16:
          copy<std::uint16_t>(files_[file], first, here, out);
          break;
        case token_format::uint32:
          copy<std::uint32_t>(files_[file], first, here, out);
          break;
      }
      position += here;
      count -= here;
      out += here;
      ++file;
    }
  }

 private:
  template <class Stored>
  void copy(const mapped_file& file, index_t first, index_t count, token_t* out) const {
    const auto* source = reinterpret_cast<const Stored*>(file.data()) + first;  // a mapping starts on a page: aligned
    for (index_t i = 0; i < count; ++i) {
      if (static_cast<index_t>(source[i]) >= vocab_size_)
        throw value_error(
            message(file.path(), ": token ", first + i, " is ", +source[i], ", the vocabulary has ", vocab_size_));
      out[i] = static_cast<token_t>(source[i]);
    }
  }

  token_format format_;
  index_t vocab_size_;
  std::vector<mapped_file> files_;
  std::vector<index_t> starts_{0};  // of each file in the stream, then the end
};

}  // namespace ratplus::io
