// Attention on the CPU, forward and backward, per pattern: time against what the visited keys predict at the machine's
// FMA peak (of_peak), against dense attention (x_dense; keys_x_dense is what the visited keys predict) and against one
// thread. Queries, keys and values are the heads of (B, T, H·d) rows.

#include <map>

#include "ratplus/backend/cpu/backend.hpp"

#include "measure.hpp"
#include "ratplus/pattern/facts.hpp"
#include "ratplus/pattern/names.hpp"

using namespace ratplus;

namespace {

struct attention {
  index_t B, H, T, d;
  tensor<float, 4> q, k, v, out, dout, dq, dk, dv;  // (B, T, H, d)
  tensor<float, 3> lse;

  attention(index_t b, index_t h, index_t t, index_t c) : B(b), H(h), T(t), d(c) {
    unsigned seed = 1;
    for (auto* x : {&q, &k, &v, &dout, &out, &dq, &dk, &dv}) {
      *x = make_tensor<float>(B, T, H, d);
      bench::fill_random(*x, seed++);
    }
    lse = make_tensor<float>(B, H, T);
  }

  static view<float, 4> heads(tensor<float, 4>& x) { return x.view().swap(1, 2); }

  template <class Ctx, class P>
  void forward(Ctx& ctx, const P& pattern) {
    attend_forward(ctx, pattern, attend_forward_args<float>{heads(q), heads(k), heads(v), heads(out), lse, {}, {}});
  }
  template <class Ctx, class P>
  void backward(Ctx& ctx, const P& pattern) {
    attend_backward(
        ctx, pattern,
        attend_backward_args<float>{
            heads(q), heads(k), heads(v), heads(out), heads(dout), lse, heads(dq), heads(dk), heads(dv), {}});
  }
};

/// The largest relative error of outputs and gradients on a small case, against the reference backend.
template <class P>
double error_of(const P& pattern, index_t d, int threads) {
  attention fast(1, 2, 331, d), slow(1, 2, 331, d);
  cpu::context ctx(threads);
  reference::context reference;
  fast.forward(ctx, pattern);
  slow.forward(reference, pattern);
  fast.backward(ctx, pattern);
  slow.backward(reference, pattern);
  double worst = 0;
  for (const auto& [a, b] : {std::pair(&fast.out, &slow.out), std::pair(&fast.dq, &slow.dq),
                             std::pair(&fast.dk, &slow.dk), std::pair(&fast.dv, &slow.dv)})
    worst = std::max(worst, bench::difference(a->data(), b->data(), a->size()));
  return worst;
}

/// Median seconds of the latest runs, by everything but the pattern and by everything but the threads.
std::map<std::string, double> known;
void remember_or_compare(benchmark::State& state, const char* counter, const std::string& key, bool remember,
                         double time) {
  if (remember) known[key] = time;
  if (const auto before = known.find(key); before != known.end()) state.counters[counter] = before->second / time;
}

template <class P>
void attend(benchmark::State& state, const std::string& name, const P& pattern, index_t H, index_t T, index_t d,
            int threads, bool backward) {
  if (!bench::check(state, "attention", error_of(pattern, d, threads), 2e-6)) return;
  cpu::context ctx(threads);
  attention a(1, H, T, d);
  a.forward(ctx, pattern);
  const double time = bench::run(state, [&] { backward ? a.backward(ctx, pattern) : a.forward(ctx, pattern); });
  const index_t flops = backward ? attention_backward_flops(pattern, T, H, d) : attention_flops(pattern, T, H, d);
  bench::report_flops(state, time, static_cast<double>(flops), threads);
  state.counters["keys"] = static_cast<double>(keys_visited(pattern, T));
  state.counters["keys_x_dense"] =
      static_cast<double>(keys_visited(dense{}, T)) / static_cast<double>(keys_visited(pattern, T));
  const std::string shape = message(backward ? "backward " : "forward ", H, " ", T, " ", d);
  remember_or_compare(state, "x_dense", message("dense ", shape, " ", threads), name == "dense", time);
  remember_or_compare(state, "x_1_thread", message(name, " ", shape), threads == 1, time);
}

template <class P>
void add(const std::string& name, const P& pattern, index_t H, index_t T, index_t d) {
  for (const bool backward : {false, true})
    for (const int threads : {1, 2})
      benchmark::RegisterBenchmark(
          message(backward ? "backward/" : "forward/", name, "/T:", T, "/H:", H, "/d:", d, "/threads:", threads)
              .c_str(),
          [=](benchmark::State& state) { attend(state, name, pattern, H, T, d, threads, backward); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const index_t d : {64, 128}) add("dense", dense{}, 8, 4096, d);
  add("dilated:64", dilated<64>{}, 8, 4096, 64);
  add("dense", dense{}, 4, 16384, 64);
  add("dilated:16", dilated<16>{}, 4, 16384, 64);
  add("dilated:64", dilated<64>{}, 4, 16384, 64);
  add("local:1024+sinks:4", streaming<1024, 4>{}, 4, 16384, 64);
  add("dilated:16+local:256+sinks:4", sparse<16, 256, 4>{}, 4, 16384, 64);
  return bench::run_all(argc, argv);
}
