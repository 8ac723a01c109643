#pragma once
// Exceptions by kind. Every message names the thing and the values: `attend: keys have 6 heads, queries 16`.

#include <sstream>
#include <stdexcept>
#include <string>

namespace ratplus {

/// Base of everything the library throws.
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Shapes of an operation's arguments do not fit together.
struct shape_error : error {
  using error::error;
};

/// A value is outside its domain: a token id, a hyper-parameter, a pattern's number, a pattern's text.
struct value_error : error {
  using error::error;
};

/// A file's bytes are not what its format promises.
struct format_error : error {
  using error::error;
};

/// The operating system refused a file operation.
struct io_error : error {
  using error::error;
};

/// A sequence outgrew the KV cache it was given.
struct cache_full : error {
  using error::error;
};

/// Concatenates its arguments as text; for building messages.
template <class... Parts>
[[nodiscard]] std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace ratplus
