// The text form: what is accepted, how it is printed back, and what is said about everything else.

#include "ratplus/pattern/parse.hpp"

#include <vector>

#include "ratplus/pattern/names.hpp"
#include "support/catch.hpp"
#include "support/visibility.hpp"

using namespace ratplus;
using ratplus_tests::combinations;
using ratplus_tests::numbers;

namespace {

/// What parse_pattern or parse_schedule says about a text that it refuses.
template <class Parse>
std::string refusal(Parse parse, std::string_view text) {
  try {
    parse(text);
  } catch (const value_error& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("terms in any order are the three numbers") {
  CHECK(parse_pattern("dense") == any_sparse(dense{}));
  CHECK(parse_pattern("dilated:16") == any_sparse(16, 0, 0));
  CHECK(parse_pattern("dilated:1") == any_sparse(dense{}));
  CHECK(parse_pattern("local:1024+sinks:4") == any_sparse(std::nullopt, 1024, 4));
  CHECK(parse_pattern("dilated:16+local:256+sinks:4") == any_sparse(16, 256, 4));
  CHECK(parse_pattern("sinks:4+local:256+dilated:16") == any_sparse(16, 256, 4));
  CHECK(parse_pattern("sinks:3") == any_sparse(std::nullopt, 0, 3));
  CHECK(parse_pattern("local:0") == any_sparse(std::nullopt, 0, 0));
  CHECK(parse_pattern("dense+local:2") == any_sparse(1, 2, 0));
  CHECK(parse_pattern("local:2147483647") == any_sparse(std::nullopt, max_position, 0));
  CHECK(parse_pattern("dilated:016") == any_sparse(16, 0, 0));
}

TEST_CASE("layers and head groups are a schedule") {
  const any_sparse full = dense{}, sixteenth = dilated<16>{};
  CHECK(parse_schedule("dilated:16") == any_schedule(sixteenth));
  CHECK(parse_schedule("dense,dilated:16") == any_schedule(by_layer<dense, dilated<16>>{}));
  CHECK(parse_schedule("[dense|dilated:16],dense") == any_schedule(by_layer<by_head<dense, dilated<16>>, dense>{}));
  CHECK(parse_schedule("[dense]") == any_schedule(full));
  CHECK(parse_schedule("[local:3|sinks:2+local:1|dense]") == any_schedule(by_head<local<3>, streaming<1, 2>, dense>{}));
}

TEST_CASE("printing gives one form, and parsing it gives the pattern back") {
  CHECK(to_string(dense{}) == "dense");
  CHECK(to_string(dilated<1>{}) == "dense");
  CHECK(to_string(dilated_local<16, 0>{}) == "dilated:16");
  CHECK(to_string(with_sinks<4, dilated_local<16, 256>>{}) == "dilated:16+local:256+sinks:4");
  CHECK(to_string(streaming<0, 4>{}) == "sinks:4");
  CHECK(to_string(streaming<8, 4>{}) == "local:8+sinks:4");
  CHECK(to_string(local<0>{}) == "local:0");
  CHECK(to_string(parse_pattern("sinks:4+dilated:1")) == "dense+sinks:4");
  CHECK(to_string(by_head<dense, dilated<16>>{}) == "[dense|dilated:16]");
  CHECK(to_string(by_head<dense>{}) == "dense");
  CHECK(to_string(any_by_head(dilated<2>{})) == "dilated:2");
  CHECK(to_string(by_layer<by_head<dense, dilated<16>>, local<2>>{}) == "[dense|dilated:16],local:2");
  CHECK(to_string(any_schedule{}) == "dense");

  const std::vector<numbers> all =
      combinations({1, 2, 16, max_position}, {0, 1, 40, max_position}, {0, 1, 4, max_position});
  std::vector<any_by_head> layers;
  for (const numbers& a : all)
    for (const numbers& b : all) {
      const any_sparse first(a.dilation, a.window, a.sinks), second(b.dilation, b.window, b.sinks);
      INFO(a << ", " << b);
      REQUIRE(parse_pattern(to_string(first)) == first);
      const any_schedule heads(any_by_head({first, second}));
      REQUIRE(parse_schedule(to_string(heads)) == heads);
      layers.push_back(any_by_head({second, first, second}));
      layers.push_back(first);
    }
  const any_schedule everything(layers);
  CHECK(parse_schedule(to_string(everything)) == everything);
}

TEST_CASE("every other text is refused with the text, the term and what is expected") {
  const std::string expected = "expected dense, dilated:D, local:W or sinks:S, joined by '+'";
  const std::pair<const char*, std::string> cases[] = {
      {"", "pattern '': nothing is written, " + expected},
      {"dilated:16+locl:4", "pattern 'dilated:16+locl:4': unknown term 'locl:4', " + expected},
      {"Dense", "pattern 'Dense': unknown term 'Dense', " + expected},
      {":4", "pattern ':4': unknown term ':4', " + expected},
      {"dense+", "pattern 'dense+': a term is empty, " + expected},
      {"+dense", "pattern '+dense': a term is empty, " + expected},
      {"dilated", "pattern 'dilated': 'dilated' lacks its number, " + expected},
      {"sinks:4+local:", "pattern 'sinks:4+local:': 'local:': the number is missing"},
      {"dilated:x", "pattern 'dilated:x': 'dilated:x': 'x' is not a whole number"},
      {"local:-4", "pattern 'local:-4': 'local:-4': '-4' is not a whole number"},
      {"local:+4", "pattern 'local:+4': 'local:': the number is missing"},
      {"local:4.5", "pattern 'local:4.5': 'local:4.5': '4.5' is not a whole number"},
      {"local:4:4", "pattern 'local:4:4': 'local:4:4': '4:4' is not a whole number"},
      {"sinks:2147483648",
       "pattern 'sinks:2147483648': 'sinks:2147483648': '2147483648' is more than 2147483647, the last position"},
      {"sinks:99999999999999999999",
       "pattern 'sinks:99999999999999999999': 'sinks:99999999999999999999': '99999999999999999999' is more than "
       "2147483647, the last position"},
      {"dilated:0", "pattern 'dilated:0': 'dilated:0': a dilation is at least 1 (dilated:1 is dense)"},
      {"dense:4", "pattern 'dense:4': 'dense:4': dense takes no number"},
      {"dense+dilated:4",
       "pattern 'dense+dilated:4': dense and dilated:D both give the dilation, 'dilated:4' gives it again"},
      {"dense+dense", "pattern 'dense+dense': dense and dilated:D both give the dilation, 'dense' gives it again"},
      {"local:1+local:1",
       "pattern 'local:1+local:1': 'local:1' gives the same number again, expected at most one local term"},
      {"dense ", "pattern 'dense ': spaces are not allowed"},
      {"dense\n", "pattern 'dense.': spaces are not allowed"},
  };
  for (const auto& [text, says] : cases) {
    CHECK(refusal(parse_pattern, text) == says);
    CHECK(refusal(parse_schedule, text) == says);
  }

  const std::string brackets = "; one pattern for each head group is written [a|b], one for each layer a,b";
  const std::pair<const char*, std::string> schedules[] = {
      {"dense,", "pattern 'dense,': a layer is empty, " + expected},
      {",dense", "pattern ',dense': a layer is empty, " + expected},
      {"[]", "pattern '[]': a term is empty, " + expected},
      {"[dense|]", "pattern '[dense|]': a term is empty, " + expected},
      {"[dense", "pattern '[dense': no ']' closes '[dense', expected [pattern|pattern|...]"},
      {"[", "pattern '[': no ']' closes '[', expected [pattern|pattern|...]"},
      {"[dense,local:4]", "pattern '[dense,local:4]': no ']' closes '[dense', expected [pattern|pattern|...]"},
      {"dense]", "pattern 'dense]': ']' is not expected in 'dense]'" + brackets},
      {"[[dense]]", "pattern '[[dense]]': '[' is not expected in '[dense]'" + brackets},
      {"[dense]x]", "pattern '[dense]x]': ']' is not expected in 'dense]x'" + brackets},
      {"dense|local:3", "pattern 'dense|local:3': '|' is not expected in 'dense|local:3'" + brackets},
      {"dense, local:3", "pattern 'dense, local:3': spaces are not allowed"},
  };
  for (const auto& [text, says] : schedules) CHECK(refusal(parse_schedule, text) == says);
  CHECK(refusal(parse_pattern, "[dense]") == "pattern '[dense]': '[' is not expected in '[dense]'" + brackets);
  CHECK(refusal(parse_pattern, "dense,dense") ==
        "pattern 'dense,dense': ',' is not expected in 'dense,dense'" + brackets);
}

TEST_CASE("a message is one line and quotes at most a line") {
  std::string hostile(1'000'000, 'x');
  hostile[3] = '\x1b';
  hostile[4] = '\0';
  const std::string says = refusal(parse_schedule, hostile);
  CHECK(says.size() < 500);
  CHECK(says.find('\x1b') == std::string::npos);
  CHECK(says.find('\0') == std::string::npos);
  CHECK(says.find("xxx..xxx") != std::string::npos);
}
