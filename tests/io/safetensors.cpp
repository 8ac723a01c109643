// Round trips of fresh data through files, every conversion, and files made to hurt the reader.

#include "ratplus/io/safetensors.hpp"

#include <cmath>
#include <cstdint>
#include <random>

#include "support/catch.hpp"
#include "support/scratch.hpp"

using namespace ratplus;
using namespace ratplus_tests;

namespace {

tensor<float, 2> random_tensor(index_t rows, index_t columns, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  auto values = make_tensor<float>(rows, columns);
  for (index_t i = 0; i < values.size(); ++i) values.data()[i] = normal(random);
  return values;
}

/// The bytes of a safetensors file with this header text.
std::string file_bytes(const std::string& header, const std::string& data = "") {
  std::string bytes(8, '\0');
  const auto length = static_cast<std::uint64_t>(header.size());
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

template <class... T>
std::string little_endian(T... values) {
  std::string bytes;
  const auto append = [&](auto value) {
    char raw[sizeof(value)];
    std::memcpy(raw, &value, sizeof(value));
    bytes.append(raw, sizeof(value));
  };
  (append(values), ...);
  return bytes;
}

/// Reads everything the file holds, as a program would.
void read_all(const std::string& path) {
  const auto file = io::safetensors_file::open(path);
  for (const std::string& name : file.names()) {
    const bool integers = io::name_of(file.info(name).type).find_first_of("UI") == 0;
    if (integers) {
      (void)file.read_flat<token_t>(name);
    } else {
      (void)file.read_flat<float>(name);
    }
  }
}

/// A small file with three dtypes, two ranks and metadata.
void write_small(const std::string& path) {
  const auto weights = random_tensor(2, 3, 1);
  auto halves = make_tensor<bfloat16>(index_t{5});
  for (index_t i = 0; i < 5; ++i) halves.data()[i] = bfloat16(static_cast<float>(i) / 3);
  auto tokens = make_tensor<token_t>(2, 2);
  for (index_t i = 0; i < 4; ++i) tokens.data()[i] = static_cast<token_t>(i * 7);
  io::safetensors_writer writer;
  writer.set_metadata("format", "pt");
  writer.add("a.weight", weights);
  writer.add("b", halves);
  writer.add("tokens", tokens);
  writer.write(path);
}

}  // namespace

TEST_CASE("safetensors: what is written is read back, bit for bit") {
  const scratch_folder folder;
  const std::string path = folder / "model.safetensors";
  const auto seed = GENERATE(1u, 2u, 3u);
  std::mt19937_64 random(seed);

  const auto weights = random_tensor(7, 13, seed);
  auto exact = make_tensor<double>(2, 3, 5);
  for (index_t i = 0; i < exact.size(); ++i) exact.data()[i] = std::ldexp(static_cast<double>(random()), -70);
  auto halves = make_tensor<bfloat16>(index_t{31});
  for (index_t i = 0; i < halves.size(); ++i) halves.data()[i].bits = static_cast<std::uint16_t>(random());
  auto tokens = make_tensor<token_t>(3, 4);
  for (index_t i = 0; i < tokens.size(); ++i) tokens.data()[i] = static_cast<token_t>(random());
  auto counts = make_tensor<std::uint64_t>(index_t{9});
  for (index_t i = 0; i < counts.size(); ++i) counts.data()[i] = random();
  const auto nothing = make_tensor<float>(0, 4);

  io::safetensors_writer writer;
  writer.add("layers.0.weight", weights);
  writer.add("exact", exact);
  writer.add("halves", halves);
  writer.add("tokens", tokens);
  writer.add("counts", counts);
  writer.add("nothing", nothing);
  writer.add("a \"quoted\\ name\"\n", weights.view().slice(0, 2, 4));
  writer.set_metadata("config", R"({"vocab_size": 256})");
  writer.set_metadata("step", "12");
  writer.write(path);

  const auto file = io::safetensors_file::open(path);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"config", R"({"vocab_size": 256})"}, {"step", "12"}});
  CHECK(file.names() == std::vector<std::string>{"a \"quoted\\ name\"\n", "counts", "exact", "halves",
                                                 "layers.0.weight", "nothing", "tokens"});
  CHECK(file.contains("tokens"));
  CHECK_FALSE(file.contains("token"));
  CHECK(file.info("exact").type == io::dtype::f64);
  CHECK(file.info("exact").shape == std::vector<index_t>{2, 3, 5});
  CHECK(file.info("exact").bytes() == 240);

  const auto same = [](const auto& a, const auto& b) {
    return a.shape() == b.shape() && (a.size() == 0 || std::memcmp(a.data(), b.data(), a.bytes()) == 0);
  };
  CHECK(same(file.read<float, 2>("layers.0.weight"), weights));
  CHECK(same(file.read<double, 3>("exact"), exact));
  CHECK(same(file.read<bfloat16, 1>("halves"), halves));
  CHECK(same(file.read<token_t, 2>("tokens"), tokens));
  CHECK(same(file.read<std::uint64_t, 1>("counts"), counts));
  CHECK(same(file.read<float, 2>("nothing"), nothing));

  const auto seen = file.view<double, 3>("exact");
  CHECK(seen.shape() == exact.shape());
  CHECK(std::memcmp(seen.data(), exact.data(), exact.bytes()) == 0);
  const auto slice = file.view<float, 2>("a \"quoted\\ name\"\n");
  CHECK(slice.extent(0) == 2);
  CHECK(slice(0, 0) == weights.view()(2, 0));
  CHECK(slice(1, 12) == weights.view()(3, 12));

  auto wide = make_tensor<float>(7, 20);  // rows with a stride: a slice of something larger
  std::fill(wide.data(), wide.data() + wide.size(), -1.0f);
  const view<float, 2> target(wide.data() + 4, extents<2>{{7, 13}}, extents<2>{{20, 1}});
  file.read_into("layers.0.weight", target);
  for (index_t i = 0; i < 7; ++i)
    for (index_t j = 0; j < 20; ++j) CHECK(wide.view()(i, j) == (j >= 4 && j < 17 ? weights.view()(i, j - 4) : -1.0f));
}

TEST_CASE("safetensors: the same content gives the same bytes, whatever the order it was added in") {
  const scratch_folder folder;
  const auto a = random_tensor(3, 5, 1), b = random_tensor(2, 2, 2);
  auto tokens = make_tensor<std::uint16_t>(index_t{3});
  std::fill(tokens.data(), tokens.data() + 3, std::uint16_t{7});
  io::safetensors_writer forward, backward;
  forward.add("a", a);
  forward.add("b", b);
  forward.add("c", tokens);
  forward.set_metadata("x", "1");
  forward.set_metadata("y", "2");
  backward.set_metadata("y", "2");
  backward.set_metadata("x", "1");
  backward.add("c", tokens);
  backward.add("b", b);
  backward.add("a", a);
  forward.write(folder / "forward");
  backward.write(folder / "backward");
  CHECK(read_file(folder / "forward") == read_file(folder / "backward"));
  CHECK(folder.files() == std::vector<std::string>{"backward", "forward"});
}

TEST_CASE("safetensors: an empty file of tensors is legal") {
  const scratch_folder folder;
  io::safetensors_writer().write(folder / "none");
  CHECK(io::safetensors_file::open(folder / "none").names().empty());
}

TEST_CASE("safetensors: every half-precision number converts exactly") {
  const scratch_folder folder;
  std::string data;
  for (unsigned bits = 0; bits < 65536; ++bits) data += little_endian(static_cast<std::uint16_t>(bits));
  write_file(folder / "f16", file_bytes(R"({"x":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}})", data));
  const auto values = io::safetensors_file::open(folder / "f16").read_flat<float>("x");
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    const double sign = bits >> 15 != 0 ? -1 : 1;
    const float found = values[bits];
    if (exponent == 31 && mantissa != 0) {
      wrong += !std::isnan(found);
    } else {
      const double magnitude = exponent == 31  ? HUGE_VAL
                               : exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(1024 + mantissa, exponent - 25);
      wrong += !(static_cast<double>(found) == sign * magnitude && std::signbit(found) == (sign < 0));
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE(
    "safetensors: floats convert between widths, integers between those that hold them, never one into the other") {
  const scratch_folder folder;
  const std::string path = folder / "mixed";
  auto real = make_tensor<double>(index_t{3});
  real.data()[0] = 1.0 + 0x1p-30;
  real.data()[1] = -2.5;
  real.data()[2] = std::nan("");
  auto whole = make_tensor<std::int64_t>(index_t{3});
  whole.data()[0] = 5;
  whole.data()[1] = 2147483647;
  whole.data()[2] = -2147483648;
  auto large = make_tensor<std::int64_t>(2, 2);
  for (index_t i = 0; i < 4; ++i) large.data()[i] = i == 2 ? 2147483648 : 0;
  io::safetensors_writer writer;
  writer.add("real", real);
  writer.add("whole", whole);
  writer.add("large", large);
  writer.write(path);

  const auto file = io::safetensors_file::open(path);
  const auto narrow = file.read_flat<float>("real");
  CHECK(narrow[0] == 1.0f);
  CHECK(narrow[1] == -2.5f);
  CHECK(std::isnan(narrow[2]));
  const auto half = file.read_flat<bfloat16>("real");
  CHECK(static_cast<float>(half[1]) == -2.5f);
  CHECK(std::isnan(static_cast<float>(half[2])));
  CHECK(file.read_flat<token_t>("whole") == std::vector<token_t>{5, 2147483647, -2147483648});

  const auto too_large = message_of<format_error>([&] { (void)file.read<token_t, 2>("large"); });
  CHECK_THAT(too_large, contains(path));
  CHECK_THAT(too_large, contains("'large': element 2 is 2147483648"));
  auto rows = make_tensor<token_t>(2, 2);
  CHECK_THAT(message_of<format_error>([&] { file.read_into("large", rows.view()); }),
             contains("element 2 is 2147483648"));
  CHECK_THAT(message_of<format_error>([&] { (void)file.read_flat<std::uint8_t>("whole"); }),
             contains("element 1 is 2147483647, outside 0 … 255"));
  CHECK_THAT(message_of<format_error>([&] { (void)file.read_flat<float>("whole"); }),
             contains("dtype is I64, expected F32"));
  CHECK_THAT(message_of<format_error>([&] { (void)file.read_flat<token_t>("real"); }),
             contains("dtype is F64, expected integers"));
}

TEST_CASE("safetensors: asking for what the file has not is an error with both sides named") {
  const scratch_folder folder;
  const std::string path = folder / "small";
  write_small(path);
  const auto file = io::safetensors_file::open(path);
  const auto missing = message_of<format_error>([&] { (void)file.read<float, 2>("a.wait"); });
  CHECK_THAT(missing, contains(path) && contains("has no tensor 'a.wait'"));
  CHECK_THAT(message_of<format_error>([&] { (void)file.read<float, 3>("a.weight"); }),
             contains("'a.weight': shape is (2, 3), expected 3 dimensions"));
  auto transposed = make_tensor<float>(3, 2);
  CHECK_THAT(message_of<format_error>([&] { file.read_into("a.weight", transposed.view()); }),
             contains("'a.weight': shape is (2, 3), expected (3, 2)"));
  CHECK_THAT(message_of<format_error>([&] { (void)file.view<double, 2>("a.weight"); }),
             contains("'a.weight': dtype is F32, expected F64"));
  CHECK_THAT(message_of<io_error>([&] { (void)io::safetensors_file::open(folder / "absent"); }),
             contains("absent: cannot open: No such file or directory"));
  CHECK_THAT(message_of<io_error>([&] { (void)io::safetensors_file::open(folder.path()); }),
             contains("not a regular file"));
}

TEST_CASE("safetensors: the writer refuses what the format cannot hold") {
  const scratch_folder folder;
  auto values = random_tensor(4, 4, 1);
  io::safetensors_writer writer;
  writer.add("x", values);
  CHECK_THROWS_AS(writer.add("x", values), value_error);
  CHECK_THROWS_AS(writer.add("__metadata__", values), value_error);
  CHECK_THROWS_AS(writer.add("columns", values.view().slice(1, 0, 2)), shape_error);
  writer.add("not \xff UTF-8", values);
  CHECK_THROWS_AS(writer.write(folder / "bad"), value_error);
  CHECK(folder.files().empty());
}

TEST_CASE("safetensors: data may start at any byte") {
  const scratch_folder folder;
  const std::string path = folder / "unaligned";
  // 8 bytes of length, 164 of header, 3 of `b`: the floats lie at byte 175 of a mapping that starts on a page
  write_file(path, file_bytes(R"({"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                              R"("x":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},)"
                              R"("y":{"dtype":"F64","shape":[],"data_offsets":[11,19]}}   )",
                              "abc" + little_endian(1.5f, -3.25f, 0.1)));
  const auto file = io::safetensors_file::open(path);
  CHECK(file.read_flat<float>("x") == std::vector<float>{1.5f, -3.25f});
  CHECK(file.read_flat<double>("y") == std::vector<double>{0.1});
  CHECK(file.read_flat<token_t>("b") == std::vector<token_t>{'a', 'b', 'c'});
  CHECK_THAT(message_of<format_error>([&] { (void)file.view<float, 1>("x"); }),
             contains("'x': data at byte 3 is not aligned"));
}

TEST_CASE("safetensors: a header that lies is an error that says where") {
  const scratch_folder folder;
  const std::string path = folder / "hostile";
  const std::string float4(16, '\0');
  struct lie {
    std::string header, data, expected;
  };
  const std::string many_ones = [] {
    std::string text = "1";
    for (int i = 0; i < 40; ++i) text += ",1";
    return text;
  }();
  const lie lies[] = {
      {"", "", "header does not begin with '{'"},
      {"[]", "", "header does not begin with '{'"},
      {" {}", "", "header does not begin with '{'"},
      {"{", "", "not valid JSON at byte"},
      {"{}}", "", "not valid JSON at byte 3"},
      {"{} x", "", "not valid JSON"},
      {"{\"\xff\xfe\":{}}", "", "not valid JSON"},
      {"{}", "x", "tensors take 0 bytes, the file has 1"},
      {R"({"x":3})", "", "'x': a number where none belongs"},
      {R"({"x":null})", "", "'x': null where a value belongs"},
      {R"({"x":[]})", "", "'x': an array where none belongs"},
      {R"({"x":"F32"})", "", "'x': a string where none belongs"},
      {R"({"x":{}})", "", "'x': has no dtype"},
      {R"({"x":{"dtype":"F32","data_offsets":[0,16]}})", float4, "'x': has no shape"},
      {R"({"x":{"dtype":"F32","shape":[4]}})", float4, "'x': has no data_offsets"},
      {R"({"x":{"shape":[4],"data_offsets":[0,16]}})", float4, "'x': has no dtype"},
      {R"({"x":{"dtype":"F33","shape":[4],"data_offsets":[0,16]}})", float4, "'x': unknown dtype 'F33'"},
      {R"({"x":{"dtype":32,"shape":[4],"data_offsets":[0,16]}})", float4, "'x': a number where none belongs"},
      {R"({"x":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}})", float4, "'x': an array where none belongs"},
      {R"({"x":{"dtype":"F32","shape":4,"data_offsets":[0,16]}})", float4, "'x': a number where none belongs"},
      {R"({"x":{"dtype":"F32","shape":[[4]],"data_offsets":[0,16]}})", float4, "'x': an array where none belongs"},
      {R"({"x":{"dtype":"F32","shape":{"a":4},"data_offsets":[0,16]}})", float4, "'x': an object where none belongs"},
      {R"({"x":{"dtype":"F32","shape":["4"],"data_offsets":[0,16]}})", float4, "'x': a string where none belongs"},
      {R"({"x":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}})", float4, "'x': negative number -4"},
      {R"({"x":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}})", float4, "'x': not a whole number: '4.0'"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"extra":1}})", float4, "'x': unknown field 'extra'"},
      {R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})", float4,
       "'x': shape (3) of F32, but data_offsets give 16"},
      {R"({"x":{"dtype":"F64","shape":[4],"data_offsets":[0,16]}})", float4,
       "'x': shape (4) of F64, but data_offsets give 16"},
      {R"({"x":{"dtype":"F32","shape":[],"data_offsets":[0,16]}})", float4,
       "'x': shape () of F32, but data_offsets give 16"},
      {R"({"x":{"dtype":"F32","shape":[0],"data_offsets":[0,16]}})", float4,
       "'x': shape (0) of F32, but data_offsets give 16"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0]}})", float4,
       "'x': data_offsets are 1 numbers, expected 2"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16,16]}})", float4, "data_offsets are 3 numbers"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}})", float4,
       "'x': data_offsets begin at 16 and end before"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[4,20]}})", float4 + "1234",
       "'x': data begins at byte 4, expected 0"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", float4 + "1",
       "tensors take 16 bytes, the file has 17"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", "short", "tensors take 16 bytes, the file has 5"},
      // overlap and gap
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
       float4, "'y': data begins at byte 8, expected 16"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
       float4, "'y': data begins at byte 8, expected 4"},
      // numbers that wrap when multiplied or added
      {R"({"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", "",
       "shape (4611686018427387904)"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", "", "(4294967296, 4294967296)"},
      {R"({"x":{"dtype":"U8","shape":[3037000500,3037000500,2],"data_offsets":[0,0]}})", "",
       "data_offsets give 0 bytes"},
      {R"({"x":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,16]}})", float4,
       "shape holds 18446744073709551615"},
      {R"({"x":{"dtype":"F32","shape":[18446744073709551617],"data_offsets":[0,16]}})", float4, "not a whole number"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[9223372036854775792,9223372036854775808]}})", float4,
       "data_offsets holds 9223372036854775808"},
      {R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[9223372036854775791,9223372036854775807]}})", float4,
       "data begins at byte 9223372036854775791, expected 0"},
      {R"({"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}})", float4, "not valid JSON"},
      {R"({"x":{"dtype":"F32","shape":[)" + many_ones + R"(],"data_offsets":[0,4]}})", "1234", "more than 16 numbers"},
      // the same key twice, at every level
      {R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       "ab", "'x': the name occurs twice"},
      {R"({"x":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "a", "'x': dtype occurs twice"},
      {R"({"x":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", "a", "'x': shape occurs twice"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", "", "metadata 'a' occurs twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", "", "__metadata__ occurs twice"},
      {R"({"__metadata__":{"a":1}})", "", "metadata 'a': a number where none belongs; values are strings"},
      {R"({"__metadata__":{"a":{}}})", "", "metadata 'a': an object where none belongs; values are strings"},
      {R"({"__metadata__":{"a":null}})", "", "metadata 'a'"},
      {R"({"__metadata__":"a"})", "", "'__metadata__': a string where none belongs"},
  };
  for (const lie& l : lies) {
    CAPTURE(l.header);
    write_file(path, file_bytes(l.header, l.data));
    const auto text = message_of<format_error>([&] { read_all(path); });
    CHECK_THAT(text, contains(path) && contains(l.expected));
  }
}

TEST_CASE("safetensors: the length of the header is believed within limits only") {
  const scratch_folder folder;
  const std::string path = folder / "length";
  const auto open = [&] { return message_of<format_error>([&] { read_all(path); }); };
  write_file(path, "");
  CHECK_THAT(open(), contains("not a safetensors file: 0 bytes"));
  write_file(path, little_endian(std::uint64_t{3}) + "{}");
  CHECK_THAT(open(), contains("header of 3 bytes promised, 2 bytes follow"));
  write_file(path, little_endian(~std::uint64_t{0}) + "{}");
  CHECK_THAT(open(), contains("header of 18446744073709551615 bytes promised"));
  write_file(path, little_endian(std::uint64_t{100'000'001}) + "{}");
  std::filesystem::resize_file(path, 200'000'000);  // sparse
  CHECK_THAT(open(), contains("header of 100000001 bytes, at most 100000000 allowed"));
}

TEST_CASE("safetensors: nesting a million levels deep is refused without recursion") {
  const scratch_folder folder;
  const std::string path = folder / "deep";
  constexpr std::size_t levels = 1'000'000;
  std::string objects;
  for (std::size_t i = 0; i < levels; ++i) objects += R"({"a":)";
  for (const std::string& header :
       {objects, R"({"x":)" + std::string(levels, '['), R"({"x":{"dtype":"F32","shape":)" + std::string(levels, '['),
        R"({"__metadata__":{"a":)" + objects}) {
    write_file(path, file_bytes(header));
    CHECK_THAT(message_of<format_error>([&] { read_all(path); }),
               contains("where none belongs") || contains("unknown field"));
  }
}

TEST_CASE("safetensors: a message stays one short line whatever the file says") {
  const scratch_folder folder;
  const std::string path = folder / "loud";
  write_file(path, file_bytes(R"({"\u0007\nname)" + std::string(1'000'000, 'n') + R"(":1})"));
  const auto text = message_of<format_error>([&] { read_all(path); });
  CHECK(text.size() < 500);
  CHECK(text.find('\n') == std::string::npos);
  CHECK(text.find('\a') == std::string::npos);
}

TEST_CASE("safetensors: a file cut at any length, or longer than it should be, is refused") {
  const scratch_folder folder;
  const std::string path = folder / "cut";
  write_small(folder / "whole");
  const std::string whole = read_file(folder / "whole");
  REQUIRE_NOTHROW(read_all(folder / "whole"));
  for (std::size_t length = 0; length < whole.size(); ++length) {
    CAPTURE(length);
    write_file(path, whole.substr(0, length));
    CHECK_THAT(message_of<format_error>([&] { read_all(path); }), contains(path));
  }
  write_file(path, whole + "x");
  CHECK_THROWS_AS(read_all(path), format_error);
}

TEST_CASE("safetensors: random damage is read or refused, never worse") {
  const scratch_folder folder;
  const std::string path = folder / "damaged";
  write_small(folder / "whole");
  const std::string whole = read_file(folder / "whole");
  const std::size_t header_end = whole.find("}}") + 2;
  std::mt19937 random(20240501);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  int read = 0, refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string bytes = whole;
    for (std::size_t damages = 1 + below(3); damages > 0; --damages) {
      const std::size_t at = below(below(4) == 0 ? bytes.size() : std::min(bytes.size(), header_end));
      switch (below(6)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
          break;
        case 2:
          bytes[at] = "0123456789,:[]{}\"\\-e"[below(20)];
          break;
        case 3:
          bytes.resize(at + 1);
          break;
        case 4:
          bytes.erase(at, 1 + below(8));
          break;
        default:
          bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(40)));
      }
      if (bytes.empty()) bytes.push_back('x');
    }
    write_file(path, bytes);
    try {
      read_all(path);
      ++read;
    } catch (const error& e) {
      ++refused;
      if (std::string(e.what()).find(path) == std::string::npos) FAIL("no path in: " << e.what());
    }
  }
  CHECK(read > 100);
  CHECK(refused > 1000);
}
