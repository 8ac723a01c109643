// Token streams against the plain concatenation of what was written.

#include "ratplus/io/token_file.hpp"

#include <cstring>
#include <random>

#include "support/catch.hpp"
#include "support/scratch.hpp"

using namespace ratplus;
using namespace ratplus_tests;
using io::token_format;
using io::token_stream;

namespace {

template <class Stored>
std::string ids(const std::vector<token_t>& tokens) {
  std::string bytes;
  for (const token_t token : tokens)
    for (std::size_t i = 0; i < sizeof(Stored); ++i) bytes += static_cast<char>(token >> 8 * i);  // little-endian
  return bytes;
}

std::vector<token_t> read(const token_stream& stream, index_t position, index_t count) {
  std::vector<token_t> out(static_cast<std::size_t>(count) + 1, -7);
  stream.read(position, count, out.data());
  CHECK(out.back() == -7);  // nothing past the end is touched
  out.pop_back();
  return out;
}

}  // namespace

TEST_CASE("tokens: every range of the concatenation, in every format") {
  const scratch_folder folder;
  const auto format = GENERATE(token_format::bytes, token_format::uint16, token_format::uint32);
  const index_t vocab = format == token_format::bytes ? 256 : format == token_format::uint16 ? 65536 : 100000;
  std::mt19937 random(3);
  std::vector<token_t> all;
  std::vector<std::string> paths;
  for (const std::size_t length : {5u, 1u, 12u, 3u}) {
    std::vector<token_t> part(length);
    for (auto& token : part) token = static_cast<token_t>(random() % static_cast<unsigned>(vocab));
    part.front() = static_cast<token_t>(vocab - 1);
    paths.push_back(folder / std::to_string(paths.size()));
    write_file(paths.back(), format == token_format::bytes    ? ids<std::uint8_t>(part)
                             : format == token_format::uint16 ? ids<std::uint16_t>(part)
                                                              : ids<std::uint32_t>(part));
    all.insert(all.end(), part.begin(), part.end());
  }
  const token_stream stream(paths, format, vocab);
  REQUIRE(stream.size() == 21);
  CHECK(stream.vocab_size() == vocab);
  for (index_t begin = 0; begin <= 21; ++begin)
    for (index_t count = 0; begin + count <= 21; ++count)
      CHECK(read(stream, begin, count) == std::vector<token_t>(all.begin() + begin, all.begin() + begin + count));

  token_t none = -7;
  const index_t huge = std::numeric_limits<index_t>::max();
  for (const auto& [position, count] :
       {std::pair<index_t, index_t>{0, 22}, {21, 1}, {-1, 1}, {0, -1}, {huge, 1}, {1, huge}})
    CHECK_THROWS_AS(stream.read(position, count, &none), value_error);
  CHECK_THAT(message_of<value_error>([&] { stream.read(20, 2, &none); }),
             contains("2 ids at 20 asked of a stream of 21"));
  CHECK(none == -7);
}

TEST_CASE("tokens: an id outside the vocabulary is named with file, index and limit") {
  const scratch_folder folder;
  write_file(folder / "a.bin", ids<std::uint16_t>({1, 2, 3}));
  write_file(folder / "b.bin", ids<std::uint16_t>({4, 61, 5}));
  const token_stream stream({folder / "a.bin", folder / "b.bin"}, token_format::uint16, 61);
  CHECK(read(stream, 0, 4) == std::vector<token_t>{1, 2, 3, 4});
  CHECK(read(stream, 5, 1) == std::vector<token_t>{5});
  token_t out[6];
  CHECK(message_of<value_error>([&] { stream.read(2, 3, out); }) ==
        folder / "b.bin" + ": token 1 is 61, the vocabulary has 61");

  write_file(folder / "wide", ids<std::uint32_t>({-1}));  // 4294967295, not -1
  const token_stream wide({folder / "wide"}, token_format::uint32, 2147483647);
  CHECK_THAT(message_of<value_error>([&] { wide.read(0, 1, out); }), contains("token 0 is 4294967295"));

  write_file(folder / "text", "abc\xff");
  const token_stream text({folder / "text"}, token_format::bytes, 128);
  CHECK_THAT(message_of<value_error>([&] { text.read(0, 4, out); }),
             contains("token 3 is 255, the vocabulary has 128"));
}

TEST_CASE("tokens: files that are no data are errors that name them") {
  const scratch_folder folder;
  write_file(folder / "good", "abcd");
  write_file(folder / "empty", "");
  write_file(folder / "odd", "abc");
  const auto open = [&](const std::string& name, token_format format) {
    return [&folder, name, format] { token_stream({folder / "good", folder / name}, format, 100); };
  };
  CHECK_THAT(message_of<format_error>(open("empty", token_format::bytes)), contains(folder / "empty: no data"));
  CHECK_THAT(message_of<format_error>(open("odd", token_format::uint16)),
             contains(folder / "odd: 3 bytes, not a whole number of 2-byte token ids"));
  CHECK_THAT(message_of<format_error>(open("odd", token_format::uint32)), contains("4-byte token ids"));
  CHECK_THAT(message_of<io_error>(open("absent", token_format::bytes)), contains("absent: cannot open: No such file"));
  CHECK_THAT(message_of<io_error>(open(".", token_format::bytes)), contains("not a regular file"));
  CHECK_THROWS_AS(token_stream({}, token_format::bytes, 256), value_error);
  CHECK_THROWS_AS(token_stream({folder / "good"}, token_format::bytes, 0), value_error);
  CHECK_THROWS_AS(token_stream({folder / "good"}, token_format::bytes, index_t{1} << 31), value_error);
}

TEST_CASE("tokens: a file larger than memory should be is not copied") {
  const scratch_folder folder;
  const std::string path = folder / "large";
  write_file(path, "start");
  constexpr index_t size = index_t{1} << 36;  // 64 GiB, sparse
  std::filesystem::resize_file(path, static_cast<std::uintmax_t>(size));
  const token_stream stream({path}, token_format::uint16, 65536);
  CHECK(stream.size() == size / 2);
  CHECK(read(stream, 0, 1) == std::vector<token_t>{'s' + ('t' << 8)});
  CHECK(read(stream, size / 2 - 3, 3) == std::vector<token_t>{0, 0, 0});
}
