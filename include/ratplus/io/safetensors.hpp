#pragma once
// safetensors: eight bytes of header length (little-endian), a JSON header { name: { dtype, shape, data_offsets } },
// then the tensors' bytes without gaps. https://github.com/huggingface/safetensors describes the format.
//
// Reading trusts nothing: the header is parsed as a stream of events into flat entries (so neither nesting nor size can
// exhaust the stack, and memory stays proportional to the file), and every shape is checked against the bytes that are
// there before anything is allocated for it. The data is mapped, not loaded; a tensor costs memory when it is read.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "ratplus/core/scalar.hpp"
#include "ratplus/core/tensor.hpp"
#include "ratplus/io/atomic.hpp"
#include "ratplus/io/detail/json.hpp"
#include "ratplus/io/mapped_file.hpp"

namespace ratplus::io {

static_assert(std::endian::native == std::endian::little, "ratplus/io: files are little-endian and mapped as they are");

enum class dtype { boolean, u8, i8, f8_e4m3, f8_e5m2, u16, i16, f16, bf16, u32, i32, f32, u64, i64, f64 };

namespace detail {

struct dtype_name {
  dtype type;
  std::string_view name;
  index_t bytes;
};

inline constexpr std::array dtype_names{
    dtype_name{dtype::boolean, "BOOL", 1},    dtype_name{dtype::u8, "U8", 1},
    dtype_name{dtype::i8, "I8", 1},           dtype_name{dtype::f8_e4m3, "F8_E4M3", 1},
    dtype_name{dtype::f8_e5m2, "F8_E5M2", 1}, dtype_name{dtype::u16, "U16", 2},
    dtype_name{dtype::i16, "I16", 2},         dtype_name{dtype::f16, "F16", 2},
    dtype_name{dtype::bf16, "BF16", 2},       dtype_name{dtype::u32, "U32", 4},
    dtype_name{dtype::i32, "I32", 4},         dtype_name{dtype::f32, "F32", 4},
    dtype_name{dtype::u64, "U64", 8},         dtype_name{dtype::i64, "I64", 8},
    dtype_name{dtype::f64, "F64", 8}};

/// IEEE half precision as stored in F16 tensors.
struct float16 {
  std::uint16_t bits = 0;

  constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1fu;
    const std::uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, exact in float32
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return sign != 0 ? -magnitude : magnitude;
    }
    const std::uint32_t wide = exponent == 0x1f ? 0xffu : exponent + 112;  // 112 = 127 - 15, the biases
    return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
  }
};

}  // namespace detail

/// "F32" and so on.
[[nodiscard]] constexpr std::string_view name_of(dtype type) {
  return detail::dtype_names[static_cast<std::size_t>(type)].name;
}

/// Bytes of one element.
[[nodiscard]] constexpr index_t bytes_of(dtype type) {
  return detail::dtype_names[static_cast<std::size_t>(type)].bytes;
}

/// The dtype whose elements are laid out as T.
template <class T>
[[nodiscard]] constexpr dtype dtype_of() {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_same_v<U, float>) {
    return dtype::f32;
  } else if constexpr (std::is_same_v<U, double>) {
    return dtype::f64;
  } else if constexpr (std::is_same_v<U, bfloat16>) {
    return dtype::bf16;
  } else {
    static_assert(std::is_integral_v<U> && !std::is_same_v<U, bool>,
                  "ratplus/io/safetensors.hpp: elements are float, double, bfloat16 or integers");
    constexpr std::array is_signed{dtype::i8, dtype::i16, dtype::i32, dtype::i64};
    constexpr std::array is_unsigned{dtype::u8, dtype::u16, dtype::u32, dtype::u64};
    constexpr auto log_bytes = static_cast<std::size_t>(std::countr_zero(sizeof(U)));
    return std::is_signed_v<U> ? is_signed[log_bytes] : is_unsigned[log_bytes];
  }
}

/// What the header says about one tensor.
struct tensor_info {
  dtype type = dtype::f32;
  std::vector<index_t> shape;
  index_t begin = 0;  // bytes [begin, end) of the file's data section
  index_t end = 0;

  [[nodiscard]] index_t bytes() const { return end - begin; }
  [[nodiscard]] index_t size() const { return bytes() / bytes_of(type); }  // elements
};

/// `(2, 3)`
[[nodiscard]] inline std::string shape_text(std::span<const index_t> shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

namespace detail {

using tensor_table = std::map<std::string, tensor_info, std::less<>>;
using metadata_table = std::map<std::string, std::string>;

/// Receives the events of nlohmann's SAX parser for a safetensors header; anything but the one legal structure throws.
class header_events {
 public:
  header_events(const std::string& path, tensor_table& tensors, metadata_table& metadata)
      : path_(path), tensors_(tensors), metadata_(metadata) {}

  bool start_object(std::size_t) {
    if (place_ == place::outside) {
      place_ = place::header;
    } else if (place_ == place::header && name_ == "__metadata__") {
      if (metadata_seen_) fail("__metadata__ occurs twice");
      metadata_seen_ = true;
      place_ = place::metadata;
    } else if (place_ == place::header) {
      const auto [entry, is_new] = tensors_.try_emplace(name_);
      if (!is_new) fail("the name occurs twice");
      info_ = &entry->second;
      has_dtype_ = has_shape_ = has_offsets_ = false;
      place_ = place::tensor;
    } else {
      fail("an object where none belongs");
    }
    return true;
  }

  bool end_object() {
    if (place_ == place::tensor) {
      if (!has_dtype_) fail("has no dtype");
      if (!has_shape_) fail("has no shape");
      if (!has_offsets_) fail("has no data_offsets");
      check_size();
    }
    place_ = place_ == place::header ? place::outside : place::header;
    return true;
  }

  bool key(std::string& key) {
    if (place_ == place::header) {
      name_ = key;
    } else if (place_ == place::metadata) {
      metadata_key_ = key;
    } else {
      bool* seen = key == "dtype"          ? &has_dtype_
                   : key == "shape"        ? &has_shape_
                   : key == "data_offsets" ? &has_offsets_
                                           : nullptr;
      if (seen == nullptr) fail(message("unknown field ", excerpt(key)));
      if (*seen) fail(message(key, " occurs twice"));
      *seen = true;
      field_ = key;
    }
    return true;
  }

  bool string(std::string& text) {
    if (place_ == place::metadata) {
      if (!metadata_.emplace(metadata_key_, text).second)
        throw format_error(message(path_, ": metadata ", excerpt(metadata_key_), " occurs twice"));
      return true;
    }
    if (place_ != place::tensor || field_ != "dtype") fail("a string where none belongs");
    const auto known = std::find_if(dtype_names.begin(), dtype_names.end(), [&](auto& d) { return d.name == text; });
    if (known == dtype_names.end()) fail(message("unknown dtype ", excerpt(text)));
    info_->type = known->type;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != place::tensor || field_ == "dtype") fail("an array where none belongs");
    place_ = place::numbers;
    numbers_.clear();
    return true;
  }

  bool number_unsigned(std::uint64_t value) {
    if (place_ != place::numbers) fail("a number where none belongs");
    if (value > static_cast<std::uint64_t>(std::numeric_limits<index_t>::max()))
      fail(message(field_, " holds ", value, ", more than fits"));
    if (numbers_.size() == max_rank) fail(message(field_, " has more than ", max_rank, " numbers"));
    numbers_.push_back(static_cast<index_t>(value));
    return true;
  }

  bool end_array() {
    place_ = place::tensor;
    if (field_ == "shape") {
      info_->shape = numbers_;
    } else {
      if (numbers_.size() != 2) fail(message("data_offsets are ", numbers_.size(), " numbers, expected 2"));
      info_->begin = numbers_[0];
      info_->end = numbers_[1];
      if (info_->begin > info_->end)
        fail(message("data_offsets begin at ", info_->begin, " and end before, at ", info_->end));
    }
    return true;
  }

  bool null() { return fail("null where a value belongs"); }
  bool boolean(bool) { return fail("true or false where none belongs"); }
  bool number_integer(std::int64_t value) { return fail(message("negative number ", value)); }
  bool number_float(double, const std::string& text) { return fail(message("not a whole number: ", excerpt(text))); }
  bool binary(std::vector<std::uint8_t>&) { return fail("binary data where none belongs"); }

  template <class Error>
  bool parse_error(std::size_t position, const std::string&, const Error&) {
    throw format_error(message(path_, ": header is not valid JSON at byte ", position));
  }

 private:
  enum class place { outside, header, metadata, tensor, numbers };
  static constexpr std::size_t max_rank = 16;

  [[noreturn]] bool fail(const std::string& what) const {
    if (place_ == place::metadata)
      throw format_error(message(path_, ": metadata ", excerpt(metadata_key_), ": ", what, "; values are strings"));
    if (place_ == place::outside) throw format_error(message(path_, ": header: ", what));
    throw format_error(message(path_, ": tensor ", excerpt(name_), ": ", what));
  }

  // shape × dtype == end − begin, without ever overflowing
  void check_size() const {
    const auto found = [&] {
      return message("shape ", shape_text(info_->shape), " of ", name_of(info_->type), ", but data_offsets give ",
                     info_->bytes(), " bytes");
    };
    const bool empty = std::find(info_->shape.begin(), info_->shape.end(), 0) != info_->shape.end();
    index_t expected = empty ? 0 : bytes_of(info_->type);
    for (const index_t n : info_->shape) {
      if (!empty && expected > std::numeric_limits<index_t>::max() / n) fail(found());
      expected *= n;
    }
    if (expected != info_->bytes()) fail(found());
  }

  const std::string& path_;
  tensor_table& tensors_;
  metadata_table& metadata_;
  place place_ = place::outside;
  std::string name_, metadata_key_, field_;
  tensor_info* info_ = nullptr;
  std::vector<index_t> numbers_;
  bool metadata_seen_ = false, has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
};

}  // namespace detail

/// A safetensors file, open for reading. Every error is a format_error that names the file, the tensor and the values.
class safetensors_file {
 public:
  /// Maps the file and checks the whole header; throws io_error when it cannot be opened.
  [[nodiscard]] static safetensors_file open(const std::string& path) { return safetensors_file(path); }

  [[nodiscard]] const std::string& path() const { return file_.path(); }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// In lexicographic order.
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& entry : tensors_) all.push_back(entry.first);
    return all;
  }

  [[nodiscard]] bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

  [[nodiscard]] const tensor_info& info(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw format_error(message(path(), ": has no tensor ", excerpt(name)));
    return found->second;
  }

  /// The tensor's own memory, valid while this object lives. The dtype must be T's, and the data aligned for T (as
  /// written by safetensors_writer it always is; the format does not promise it, so what a stranger wrote is better
  /// read than viewed).
  template <class T, int Rank>
  [[nodiscard]] ratplus::view<const T, Rank> view(std::string_view name) const {
    const tensor_info& tensor = info(name);
    if (tensor.type != dtype_of<T>()) fail_dtype(name, tensor, name_of(dtype_of<T>()));
    const std::byte* bytes = data_ + tensor.begin;
    if (reinterpret_cast<std::uintptr_t>(bytes) % alignof(T) != 0)
      fail(name,
           message("data at byte ", tensor.begin, " is not aligned for ", name_of(tensor.type), ", read it instead"));
    return {reinterpret_cast<const T*>(bytes), shape<Rank>(name, tensor)};
  }

  /// A copy of the tensor's elements as T. Floating-point tensors (F16, BF16, F32, F64) convert to float, double and
  /// bfloat16, rounding to nearest; integer tensors to any integer type that holds their values. Nothing converts
  /// between the two kinds.
  template <class T, int Rank>
  [[nodiscard]] tensor<T, Rank> read(std::string_view name) const {
    const tensor_info& tensor = info(name);
    check_kind<T>(name, tensor);
    ratplus::tensor<T, Rank> out(shape<Rank>(name, tensor));
    convert(name, tensor, 0, out.size(), out.data());
    return out;
  }

  /// All elements in row-major order, whatever the rank.
  template <class T>
  [[nodiscard]] std::vector<T> read_flat(std::string_view name) const {
    const tensor_info& tensor = info(name);
    check_kind<T>(name, tensor);
    std::vector<T> out(static_cast<std::size_t>(tensor.size()));
    convert(name, tensor, 0, tensor.size(), out.data());
    return out;
  }

  /// Fills `out`, whose shape must be the tensor's.
  template <class T, int Rank>
  void read_into(std::string_view name, ratplus::view<T, Rank> out) const {
    const tensor_info& tensor = info(name);
    check_kind<T>(name, tensor);
    if (!(shape<Rank>(name, tensor) == out.shape()))
      fail(name, message("shape is ", shape_text(tensor.shape), ", expected ", shape_text({out.shape().at, Rank})));
    copy_rows(name, tensor, 0, out);
  }

 private:
  explicit safetensors_file(const std::string& path) : file_(path) {
    constexpr std::uint64_t length_bytes = 8, max_header = 100'000'000;
    const auto fail_header = [&](const auto&... what) { throw format_error(message(path, ": ", what...)); };
    if (file_.size() < length_bytes)
      fail_header("not a safetensors file: ", file_.size(), " bytes, at least ", length_bytes, " expected");
    std::uint64_t header = 0;
    std::memcpy(&header, file_.data(), length_bytes);
    if (header > file_.size() - length_bytes)
      fail_header("header of ", header, " bytes promised, ", file_.size() - length_bytes, " bytes follow");
    if (header > max_header) fail_header("header of ", header, " bytes, at most ", max_header, " allowed");
    const auto* text = reinterpret_cast<const char*>(file_.data() + length_bytes);
    if (header == 0 || text[0] != '{') fail_header("header does not begin with '{'");

    detail::header_events events(path, tensors_, metadata_);
    nlohmann::json::sax_parse(text, text + header, &events);
    data_ = file_.data() + length_bytes + header;
    check_layout(static_cast<index_t>(file_.size() - length_bytes - header));
  }

  // The tensors lie one after the other from the first data byte to the last: no overlap, no gap, nothing missing.
  void check_layout(index_t data_bytes) const {
    std::vector<const detail::tensor_table::value_type*> in_order;
    for (const auto& entry : tensors_) in_order.push_back(&entry);
    std::sort(in_order.begin(), in_order.end(), [](auto* a, auto* b) {
      return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
    });
    index_t next = 0;
    for (const auto* entry : in_order) {
      if (entry->second.begin != next)
        fail(entry->first, message("data begins at byte ", entry->second.begin, ", expected ", next));
      next = entry->second.end;
    }
    if (next != data_bytes)
      throw format_error(message(path(), ": tensors take ", next, " bytes, the file has ", data_bytes));
  }

  [[noreturn]] void fail(std::string_view name, const std::string& what) const {
    throw format_error(message(path(), ": tensor ", excerpt(name), ": ", what));
  }
  [[noreturn]] void fail_dtype(std::string_view name, const tensor_info& tensor, std::string_view expected) const {
    fail(name, message("dtype is ", name_of(tensor.type), ", expected ", expected));
  }

  template <int Rank>
  [[nodiscard]] extents<Rank> shape(std::string_view name, const tensor_info& tensor) const {
    if (tensor.shape.size() != Rank)
      fail(name, message("shape is ", shape_text(tensor.shape), ", expected ", Rank, " dimensions"));
    extents<Rank> out;
    for (int i = 0; i < Rank; ++i) out[i] = tensor.shape[static_cast<std::size_t>(i)];
    return out;
  }

  template <class T>
  void check_kind(std::string_view name, const tensor_info& tensor) const {
    switch (tensor.type) {
      case dtype::f16:
      case dtype::bf16:
      case dtype::f32:
      case dtype::f64:
        if (std::is_integral_v<T>) fail_dtype(name, tensor, "integers");
        return;
      case dtype::u8:
      case dtype::i8:
      case dtype::u16:
      case dtype::i16:
      case dtype::u32:
      case dtype::i32:
      case dtype::u64:
      case dtype::i64:
        if (!std::is_integral_v<T>) fail_dtype(name, tensor, "F32, BF16, F16 or F64");
        return;
      default:
        fail_dtype(name, tensor, std::is_integral_v<T> ? "integers" : "F32, BF16, F16 or F64");
    }
  }

  template <class T, int Rank>
  void copy_rows(std::string_view name, const tensor_info& tensor, index_t first, ratplus::view<T, Rank> out) const {
    if constexpr (Rank == 1) {
      convert(name, tensor, first, out.extent(0), out.data());
    } else {
      const index_t rows = out.extent(0), each = rows > 0 ? out.size() / rows : 0;
      for (index_t i = 0; i < rows; ++i) copy_rows(name, tensor, first + i * each, out[i]);
    }
  }

  /// Elements [first, first + count) of the tensor.
  template <class T>
  void convert(std::string_view name, const tensor_info& tensor, index_t first, index_t count, T* out) const {
    const auto from = [&]<class Stored>(Stored) { convert_from<Stored>(name, tensor, first, count, out); };
    if constexpr (std::is_integral_v<T>) {
      switch (tensor.type) {
        case dtype::u8:
          return from(std::uint8_t{});
        case dtype::i8:
          return from(std::int8_t{});
        case dtype::u16:
          return from(std::uint16_t{});
        case dtype::i16:
          return from(std::int16_t{});
        case dtype::u32:
          return from(std::uint32_t{});
        case dtype::i32:
          return from(std::int32_t{});
        case dtype::u64:
          return from(std::uint64_t{});
        default:
          return from(std::int64_t{});
      }
    } else {
      switch (tensor.type) {
        case dtype::f16:
          return from(detail::float16{});
        case dtype::bf16:
          return from(bfloat16{});
        case dtype::f32:
          return from(float{});
        default:
          return from(double{});
      }
    }
  }

  template <class Stored, class T>
  void convert_from(std::string_view name, const tensor_info& tensor, index_t first, index_t count, T* out) const {
    const std::byte* source = data_ + tensor.begin + first * static_cast<index_t>(sizeof(Stored));
    if constexpr (std::is_same_v<Stored, T>) {
      if (count > 0) std::memcpy(out, source, static_cast<std::size_t>(count) * sizeof(T));
    } else {
      for (index_t i = 0; i < count; ++i) {
        Stored value;  // the file may put it at any byte
        std::memcpy(&value, source + i * static_cast<index_t>(sizeof(Stored)), sizeof(Stored));
        if constexpr (std::is_integral_v<T>) {
          if (!std::in_range<T>(value))
            fail(name, message("element ", first + i, " is ", +value, ", outside ", +std::numeric_limits<T>::min(),
                               " … ", +std::numeric_limits<T>::max()));
        }
        if constexpr (std::is_same_v<T, bfloat16>) {
          out[i] = bfloat16(static_cast<float>(value));
        } else {
          out[i] = static_cast<T>(value);
        }
      }
    }
  }

  mapped_file file_;
  detail::tensor_table tensors_;
  detail::metadata_table metadata_;
  const std::byte* data_ = nullptr;
};

/// Collects tensors and writes them as one file. It keeps views, not copies: the tensors must live, and hold their
/// final values, when `write` is called.
class safetensors_writer {
 public:
  /// Throws value_error for a name that was added before.
  template <class T, int Rank>
  void add(const std::string& name, view<T, Rank> values) {
    if (!values.contiguous()) throw shape_error(message("safetensors: tensor ", excerpt(name), " is not contiguous"));
    add(name, dtype_of<T>(), {values.shape().at, values.shape().at + Rank}, values.data());
  }
  template <class T, int Rank>
  void add(const std::string& name, const tensor<T, Rank>& values) {
    add(name, values.view());
  }
  template <class T, int Rank>
  void add(const std::string& name, tensor<T, Rank>&& values) = delete;  // it would be gone before `write`

  void set_metadata(const std::string& key, const std::string& value) { metadata_[key] = value; }

  /// Replaces `path`, all or nothing (see write_atomically). The same content always gives the same bytes: tensors are
  /// ordered by falling element size, so that each is aligned, then by name.
  void write(const std::string& path) const {
    std::vector<const std::pair<const std::string, source>*> in_order;
    for (const auto& entry : tensors_) in_order.push_back(&entry);
    std::stable_sort(in_order.begin(), in_order.end(),
                     [](auto* a, auto* b) { return bytes_of(a->second.type) > bytes_of(b->second.type); });
    const std::string header = header_text(path, in_order);
    const auto length = static_cast<std::uint64_t>(header.size());
    write_atomically(path, [&](output_file& out) {
      out.write(&length, sizeof(length));
      out.write(header);
      for (const auto* entry : in_order) out.write(entry->second.data, static_cast<std::size_t>(entry->second.bytes));
    });
  }

 private:
  struct source {
    dtype type;
    std::vector<index_t> shape;
    const void* data;
    index_t bytes;
  };

  void add(const std::string& name, dtype type, std::vector<index_t> shape, const void* data) {
    index_t bytes = bytes_of(type);
    for (const index_t n : shape) bytes *= n;
    if (name == "__metadata__" || !tensors_.try_emplace(name, source{type, std::move(shape), data, bytes}).second)
      throw value_error(message("safetensors: tensor name ", excerpt(name), " is taken"));
  }

  template <class Entries>
  [[nodiscard]] std::string header_text(const std::string& path, const Entries& in_order) const {
    using nlohmann::ordered_json;
    std::string text = "{";
    const auto append = [&](const std::string& name, const ordered_json& value) {
      text += (text.size() > 1 ? "," : "") + ordered_json(name).dump() + ":" + value.dump();
    };
    try {
      if (!metadata_.empty()) append("__metadata__", metadata_);
      index_t begin = 0;
      for (const auto* entry : in_order) {
        const auto& [type, shape, data, bytes] = entry->second;
        append(entry->first, {{"dtype", name_of(type)}, {"shape", shape}, {"data_offsets", {begin, begin + bytes}}});
        begin += bytes;
      }
    } catch (const nlohmann::json::exception&) {
      throw value_error(message(path, ": a tensor's name or the metadata is not valid UTF-8"));
    }
    constexpr std::size_t alignment = 64;  // of the first data byte: whole cache lines, as tensors in memory
    text += "}";
    while ((text.size() + sizeof(std::uint64_t)) % alignment != 0) text += ' ';
    return text;
  }

  std::map<std::string, source> tensors_;
  detail::metadata_table metadata_;
};

}  // namespace ratplus::io
