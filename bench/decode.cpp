// What one decoded token costs on the CPU: attention over the cached keys and values of a context of 16384 positions,
// kept in float32 or in bfloat16, and the products with the weights of a layer; bytes per second against the machine's
// read bandwidth, counting every visited key and value and every weight once. token/s is of one such layer; kv_error is
// the relative difference from attention over the same keys and values unrounded.

#include "measure.hpp"
#include "ratplus/backend/cpu/backend.hpp"
#include "ratplus/pattern/names.hpp"

using namespace ratplus;

namespace {

constexpr index_t heads = 16, head_size = 64, context_length = 16384;

template <class KV>
struct cache {
  residency where;
  std::vector<head_slots> slots;
  std::vector<token_t> first;
  tensor<KV, 3> k, v;                     // (B, slots, d)
  tensor<float, 4> q, k_new, v_new, out;  // (B, H, 1, d)

  cache(const any_sparse& pattern, index_t B, index_t positions)
      : where(pattern, positions + 1), first(static_cast<std::size_t>(B), static_cast<token_t>(positions)) {
    for (index_t h = 0; h < heads; ++h) slots.push_back({h * where.slots(), where});
    unsigned seed = 1;
    for (auto* pool : {&k, &v}) {
      *pool = make_tensor<KV>(B, heads * where.slots(), head_size);
      const auto values = make_tensor<float>(1024, head_size);
      bench::fill_random(values, seed++);
      for (index_t i = 0; i < pool->size(); ++i) pool->data()[i] = KV(values.data()[i % values.size()]);
    }
    for (auto* x : {&q, &k_new, &v_new, &out}) {
      *x = make_tensor<float>(B, heads, 1, head_size);
      bench::fill_random(*x, seed++);
    }
  }

  template <class Ctx>
  void attend(Ctx& ctx, const any_sparse& pattern, tensor<float, 4>& to) {
    const auto B = static_cast<index_t>(first.size());
    attend_forward_args<float, KV> p{q, k_new, v_new, to, {}, {}, {}};
    p.past = {k, v, as_view(static_cast<const head_slots*>(slots.data()), heads)};
    p.spans.first = as_view(static_cast<const token_t*>(first.data()), B);
    attend_forward(ctx, pattern, p);
  }
};

template <class KV>
void attend(benchmark::State& state, const any_sparse& pattern, index_t B, int threads) {
  cpu::context ctx(threads);
  {
    cache<KV> small(pattern, 2, 901);
    auto expected = make_tensor<float>(2, heads, 1, head_size);
    reference::context reference;
    small.attend(ctx, pattern, small.out);
    small.attend(reference, pattern, expected);
    if (!bench::check(state, "decoding", bench::difference(small.out.data(), expected.data(), expected.size()), 2e-6))
      return;
    // What rounding the cache to KV costs.
    cache<float> exact(pattern, 2, 901);
    exact.attend(reference, pattern, exact.out);
    state.counters["kv_error"] = bench::difference(small.out.data(), exact.out.data(), exact.out.size());
  }
  cache<KV> c(pattern, B, context_length);
  const double time = bench::run(state, [&] { c.attend(ctx, pattern, c.out); });
  const index_t keys = pattern.keys(context_length).keys();
  const index_t bytes = 2 * B * heads * keys * head_size * static_cast<index_t>(sizeof(KV));
  bench::report_bytes(state, time, static_cast<double>(bytes), bench::read_bandwidth(threads));
  state.counters["keys"] = static_cast<double>(keys);
  state.counters["token/s"] = static_cast<double>(B) / time;
}

/// The four weight matrices of a RAT+ layer of d = 1024: 14 d² numbers.
void weights(benchmark::State& state, index_t B, int threads) {
  constexpr index_t d = heads * head_size;
  cpu::context ctx(threads);
  const auto x = make_tensor<float>(B, 4 * d), y = make_tensor<float>(B, 5 * d),
             expected = make_tensor<float>(B, 5 * d);
  const auto in = make_tensor<float>(5 * d, d), out = make_tensor<float>(d, d), up = make_tensor<float>(4 * d, d),
             down = make_tensor<float>(d, 4 * d);
  unsigned seed = 1;
  bench::fill_random(x, seed++);
  for (const auto* w : {&in, &out, &up, &down}) bench::fill_random(*w, seed++);
  const auto product = [&](auto& context, const tensor<float, 2>& w, const tensor<float, 2>& to) {
    matmul_args<float> p;
    p.a = as_view(static_cast<const float*>(x.data()), B, w.extent(1));
    p.b = w.view();
    p.c = as_view(to.data(), B, w.extent(0));
    p.transpose_b = true;
    matmul(context, p);
  };
  reference::context reference;
  product(ctx, in, y);
  product(reference, in, expected);
  if (!bench::check(state, "product", bench::difference(y.data(), expected.data(), y.size()), 2e-6)) return;
  const double time = bench::run(state, [&] {
    for (const auto* w : {&in, &out, &up, &down}) product(ctx, *w, y);
  });
  bench::report_bytes(state, time, 14.0 * d * d * sizeof(float), bench::read_bandwidth(threads));
  state.counters["token/s"] = static_cast<double>(B) / time;
}

template <class F>
void add(const std::string& name, F&& f) {
  for (const index_t B : {1, 8})
    for (const int threads : {1, 2})
      benchmark::RegisterBenchmark(message(name, "/B:", B, "/threads:", threads).c_str(),
                                   [=](benchmark::State& state) { f(state, B, threads); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  add("weights", weights);
  for (const auto& [name, pattern] :
       {std::pair<std::string, any_sparse>{"dense", dense{}}, {"dilated:16", dilated<16>{}}}) {
    add(name + "/float32", [pattern = pattern](benchmark::State& state, index_t B, int threads) {
      attend<float>(state, pattern, B, threads);
    });
    add(name + "/bfloat16", [pattern = pattern](benchmark::State& state, index_t B, int threads) {
      attend<bfloat16>(state, pattern, B, threads);
    });
  }
  return bench::run_all(argc, argv);
}
