// Which keys does a query see, and what does that cost? Prints pictures and tables of the patterns; give some of your
// own on the command line: 01_see_patterns dilated:8+local:4+sinks:1
//
// In a picture a row is a query and a column a key: s is a sink, d a key that the dilation keeps, # any other key that
// is seen (the window before the query, and its own), · a key that is not seen.

#include <cstdio>
#include <ratplus/ratplus.hpp>

using namespace ratplus;

// Works for every pattern: known at compile time, at run time, or of your own.
template <class P>
void show(const P& pattern) {
  std::printf("%s\n\n%s\n", to_string(pattern).c_str(), picture(pattern, 16).c_str());
  std::printf("one layer, 4096 positions, 16 heads of 128 channels, 2 bytes an element:\n%s\n",
              describe(pattern, 4096, 16, 128).c_str());
}

int main(int argc, char** argv) try {
  if (argc > 1) {
    for (int i = 1; i < argc; ++i) show(parse_pattern(argv[i]));  // the text form, read at run time
    return 0;
  }

  show(dense{});                               // every key: ordinary causal attention
  show(dilated<4>{});                          // every fourth key, and the query's own
  show(dilated_local<4, 3>{});                 // and the three keys before the query
  show(with_sinks<2, dilated_local<4, 3>>{});  // and the first two keys
  show(streaming<3, 2>{});                     // window and sinks alone: a cache that never grows
  show(parse_pattern("dilated:5+sinks:1"));    // three numbers known at run time only

  // Facts are constants of the program: they can be asserted before anything runs.
  static_assert(keys_visited(dilated<16>{}, 4096) * 15 < keys_visited(dense{}, 4096));
  static_assert(cached_keys(dilated<16>{}, 4096) == 4096 / 16);

  // Hybrids: half of the heads of even layers dense, the other half dilated; odd layers all dilated.
  const by_layer<by_head<dense, dilated<16>>, dilated<16>> hybrid;
  std::printf("hybrid %s; its first layer:\n", to_string(hybrid).c_str());
  visit_layer(hybrid, 0, [](const auto& heads) { std::printf("%s\n", describe(heads, 4096, 16, 128).c_str()); });
} catch (const error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
