// What a stranger might write first: the same attention under another pattern visits fewer keys.
#ifdef SINGLE_FILE
#include "ratplus_single.hpp"
#else
#include <ratplus/ratplus.hpp>
#endif

#include <iostream>

int main() {
  using namespace ratplus;
  constexpr index_t T = 4096;
  static_assert(keys_visited(dilated<16>{}, T) < keys_visited(dense{}, T) / 8);
  const any_sparse pattern = dilated_local<16, 64>{};
  auto q = make_tensor<float>(1, 2, T, 8);  // (B, H, T, d)
  std::cout << keys_visited(pattern, T) << " of " << keys_visited(dense{}, T) << " keys, q has " << q.size()
            << " numbers\n";
  return keys_visited(pattern, T) < keys_visited(dense{}, T) ? 0 : 1;
}
