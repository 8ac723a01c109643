#pragma once
// Choosing the next token from logits: greedy, temperature, top-k, top-p. The random number of sequence b at position p
// is a hash of (seed, b, p), so that a generation can be repeated, cut anywhere and resumed, on any device, without a
// generator's state.

#include <cstdint>

#include "ratplus/core/host_device.hpp"
#include "ratplus/ops/context.hpp"

namespace ratplus {

struct sampling {
  double temperature = 0;  // 0: the most probable token, the lowest id among equals
  index_t top_k = 0;       // keep the k most probable; 0: all
  double top_p = 1;        // then keep the fewest of them whose probability reaches p
  std::uint64_t seed = 0;
};

/// Throws value_error when temperature < 0, top_k < 0 or top_p outside (0, 1].
inline void check_sampling(const sampling& s) {
  if (!(s.temperature >= 0)) throw value_error(message("sampling: temperature ", s.temperature, " is negative"));
  if (s.top_k < 0) throw value_error(message("sampling: top-k ", s.top_k, " is negative"));
  if (!(s.top_p > 0 && s.top_p <= 1)) throw value_error(message("sampling: top-p ", s.top_p, " is outside (0, 1]"));
}

/// Uniform in [0, 1), from the splitmix64 mixing function.
RATPLUS_HD inline double uniform(std::uint64_t seed, std::uint64_t sequence, std::uint64_t position) {
  const auto mix = [](std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  std::uint64_t z = mix(seed + 0x9e3779b97f4a7c15ull);
  z = mix(z ^ (sequence + 0x9e3779b97f4a7c15ull));
  z = mix(z ^ (position + 0x9e3779b97f4a7c15ull));
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

template <class T>
struct sample_args {
  view<const T, 2> logits = {};          // (B, V)
  view<const token_t, 1> position = {};  // (B), of the token being chosen
  view<token_t, 1> token = {};           // (B), written
};

template <Context Ctx, class T>
void sample(Ctx& ctx, const sample_args<T>& p, const sampling& how) {
  check_sampling(how);
  detail::check_shape("sample", "position", p.position, {{p.logits.extent(0)}});
  detail::check_shape("sample", "token", p.token, {{p.logits.extent(0)}});
  if (p.logits.size() > 0) sample_on(ctx, p, how);
}

}  // namespace ratplus
