// Generating with the 1.5B model of SPEC §5 on a device, bfloat16: milliseconds of one decoded token for each sequence
// at a context of 4000, sampled on the device, the step recorded once and replayed. The floor reads the weights and the
// visited keys and values once, at the bandwidth of a copy. Then the prefill of a long prompt in pieces. Checked first:
// decoding step by step chooses as the forward pass does.
//
//     generate_cuda                decoding at batch 1 and 64, then prefill of 262144 tokens
//     generate_cuda decode [BATCH PATTERN]
//     generate_cuda prefill

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "device.cuh"
#include "models.hpp"
#include "ratplus/model/generate.hpp"
#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/gated_average.hpp"

namespace {

using namespace bench;
using namespace ratplus;

using model_t = language_model<gated_average, bfloat16, ratplus::cuda::space>;
using cache_t = kv_cache<bfloat16, ratplus::cuda::space>;

constexpr index_t vocabulary = 32000;

model_config config_of(index_t d, index_t layers, index_t heads, index_t positions) {
  return model_of(vocabulary, d, layers, heads, positions);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// ‖decoded − forward‖ / ‖forward‖ of the last logits, after a prefill in pieces and a few steps.
double check(device_context& ctx, const any_sparse& pattern) {
  constexpr index_t T = 700, prefilled = 690;
  model_t model(ctx, config_of(256, 2, 2, T));
  model.initialise(ctx, 3);
  const auto ids = random_tokens(T, vocabulary, 11);
  const auto tokens = as_view(ids.data(), 1, T);
  const auto full = on_host(ctx, model.forward(ctx, pattern, tokens));
  cache_t cache(ctx, model.config(), pattern, 1, T);
  device_tensor<float, 2> logits(1, 32000);
  for (index_t t = 0; t < T;) {
    const index_t n = t < prefilled ? std::min<index_t>(230, prefilled - t) : 1;
    model.extend(ctx, pattern, cache, tokens.slice(1, t, t + n), std::nullopt, logits.view());
    t += n;
  }
  const auto decoded = on_host(ctx, logits);
  double gap = 0, norm = 0;
  for (std::size_t v = 0; v < decoded.size(); ++v) {
    const double x = decoded[v], y = full[full.size() - decoded.size() + v];
    gap += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(gap / norm);
}

void measure_decoding(device_context& ctx, model_t& model, const any_sparse& pattern, index_t B, double copy) {
  constexpr index_t context = 4000;
  constexpr int steps = 50;
  cache_t cache(ctx, model.config(), pattern, B, context + steps + 10);
  const auto ids = random_tokens(B * context, vocabulary, 11);
  const auto prompt = as_view(ids.data(), B, context);
  device_tensor<float, 2> logits(B, model.config().vocab_size);
  for (index_t t = 0; t < context; t += 500)
    model.extend(ctx, pattern, cache, prompt.slice(1, t, t + 500), std::nullopt, logits.view());
  device_tensor<token_t, 1> chosen(B), active_there(B);
  const std::vector<token_t> active(static_cast<std::size_t>(B), 1);
  upload(ctx, active.data(), active_there.view());
  const sampling how{.temperature = 1.0, .top_k = 50, .seed = 5};
  const auto choose = [&] {
    sample(ctx, sample_args<float>{.logits = logits, .position = cache.positions_there(), .token = chosen}, how);
  };
  choose();
  device_context::recording step;
  std::vector<double> times;
  std::vector<token_t> tokens(static_cast<std::size_t>(B));
  for (int i = 0; i < steps; ++i) {
    const double begin = now();
    cache.grow(active);
    replay(ctx, step, [&] {
      model.decode_step(ctx, pattern, cache, std::as_const(chosen).view(), std::as_const(active_there).view(),
                        logits.view());
      choose();
    });
    download(ctx, std::as_const(chosen).view(), tokens.data());
    if (i >= 5) times.push_back(now() - begin);
  }
  std::sort(times.begin(), times.end());
  const double ms = 1e3 * times[times.size() / 2];
  const model_config& c = model.config();
  const double keys = 2.0 * 2 * static_cast<double>(B * c.num_layers * c.d_model * pattern.keys(context).keys());
  const double weights = 2.0 * static_cast<double>(model.layout().count()), floor = (keys + weights) / copy * 1e-9;
  std::printf(
      "decode  B %-3lld %-22s %8.3f ms a token %9.0f tokens/s  floor %7.3f ms (weights %.3f) %4.0f%%  cache %.2f GiB\n",
      static_cast<long long>(B), to_string(pattern).c_str(), ms, 1e3 * static_cast<double>(B) / ms, floor,
      weights / copy * 1e-9, 100 * floor / ms, static_cast<double>(cache.bytes()) / (1 << 30));
  std::fflush(stdout);
}

void measure_prefill(device_context& ctx, model_t& model, const any_sparse& pattern, index_t T, index_t piece) {
  cache_t cache(ctx, model.config(), pattern, 1, T);
  const auto ids = random_tokens(T, vocabulary, 11);
  const auto prompt = as_view(ids.data(), 1, T);
  device_tensor<float, 2> logits(1, model.config().vocab_size);
  ctx.synchronize();
  const double begin = now();
  for (index_t t = 0; t < T; t += piece)
    model.extend(ctx, pattern, cache, prompt.slice(1, t, std::min(t + piece, T)), std::nullopt, logits.view());
  ctx.synchronize();
  const double seconds = now() - begin;
  std::size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  std::printf("prefill T %lld in pieces of %lld  %-22s %8.2f s %9.0f tokens/s  cache %.2f GiB, in use %.1f GiB\n",
              static_cast<long long>(T), static_cast<long long>(piece), to_string(pattern).c_str(), seconds,
              static_cast<double>(T) / seconds, static_cast<double>(cache.bytes()) / (1 << 30),
              static_cast<double>(total - free) / (1 << 30));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) try {
  device_context ctx;
  const bool all = argc < 2, decode = all || std::strcmp(argv[1], "decode") == 0;
  const bool prefill = all || std::strcmp(argv[1], "prefill") == 0;
  for (const char* text : {"dense", "dilated:16", "dilated:16+local:50+sinks:4"}) {
    const double error = check(ctx, parse_pattern(text));
    std::printf("check %-28s %.1e\n", text, error);
    if (!(error <= 2e-2)) return 1;
  }
  const double copy = copy_bandwidth(ctx);
  std::printf("%s, copy %.2f TB/s; 24 layers, d 2048, 16 heads of 128\n", ctx.properties().name, copy);
  constexpr index_t longest = 262144;
  model_t model(ctx, config_of(2048, 24, 16, longest));
  initialise(ctx, model);
  if (decode && argc > 3)
    measure_decoding(ctx, model, parse_pattern(argv[3]), std::atoll(argv[2]), copy);
  else if (decode)
    for (const index_t B : {1, 64})
      for (const char* text : {"dense", "dilated:16", "dilated:64", "dilated:16+local:256"})
        measure_decoding(ctx, model, parse_pattern(text), B, copy);
  if (prefill)
    for (const char* text : {"dilated:16", "dilated:16+local:256+sinks:4", "dense"})
      measure_prefill(ctx, model, parse_pattern(text), longest, 16384);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "generate: %s\n", e.what());
  return 1;
}
