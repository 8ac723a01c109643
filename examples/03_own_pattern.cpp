// A pattern of your own: three functions, and every operation of every backend takes it.

#include <cmath>
#include <cstdio>
#include <ratplus/ratplus.hpp>

using namespace ratplus;

/// A query sees its own block of keys, and the last key of every block before: a summary of it.
struct blocks {
  index_t size = 8;

  // The definition.
  RATPLUS_HD constexpr bool sees(index_t query, index_t key) const {
    return key <= query && (key / size == query / size || key % size == size - 1);
  }
  // The same keys as at most three strided runs {begin, end, step}, none of which ever goes back.
  RATPLUS_HD constexpr key_runs keys(index_t query) const {
    const index_t own = query / size * size, first = size - 1;
    return {{{first, own > first ? own : first, size}, {own, query + 1, 1}, {0, 0, 1}}};
  }
  // The last of T queries that sees a key.
  RATPLUS_HD constexpr index_t last_query(index_t key, index_t T) const {
    const index_t end = key / size * size + size - 1;
    return key == end || end >= T ? T - 1 : end;
  }
};

// Do the three agree with each other? The compiler checks every pair of positions.
static_assert(consistent(blocks{}, 64) && consistent(blocks{5}, 41) && consistent(blocks{1}, 7));

// Attention under the pattern, for numbers that depend on the position only.
template <class Ctx>
tensor<float, 4> attend(Ctx ctx, const blocks& pattern, index_t H, index_t T, index_t d) {
  auto q = make_tensor<float>(1, H, T, d), k = make_tensor<float>(1, H, T, d), out = make_tensor<float>(1, H, T, d);
  for (index_t i = 0; i < q.size(); ++i) {
    q.data()[i] = std::sin(0.37f * static_cast<float>(i % 1000));
    k.data()[i] = std::cos(0.53f * static_cast<float>(i % 1013));
  }
  attend_forward_args<float> p;
  p.q = q;
  p.k = k;
  p.v = k;
  p.out = out;
  attend_forward(ctx, pattern, p);
  return out;
}

int main() {
  const blocks pattern;
  std::printf("%s\nat 4096 positions, 16 heads of 128:\n%s\n", picture(pattern, 24).c_str(),
              describe(pattern, 4096, 16, 128).c_str());

  // The fast backend and the loops that define the operation agree.
  const auto fast = attend(cpu::context{}, pattern, 2, 300, 32);
  const auto plain = attend(reference::context{}, pattern, 2, 300, 32);
  double worst = 0;
  for (index_t i = 0; i < fast.size(); ++i)
    worst = std::fmax(worst, std::fabs(static_cast<double>(fast.data()[i] - plain.data()[i])));
  std::printf("largest difference between the CPU and the reference backend: %.1e\n", worst);
  return worst < 1e-5 ? 0 : 1;
}
