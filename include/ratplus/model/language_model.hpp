#pragma once
// The language model of SPEC §4: one object with one set of weights, every call of which is given the pattern it runs
// under.
//
//     ratplus::cpu::context cpu;
//     ratplus::language_model<ratplus::gated_average> model(cpu, config);
//     model.forward(cpu, ratplus::dense{}, tokens, logits);
//     model.forward(cpu, ratplus::dilated<16>{}, tokens, logits);

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "ratplus/model/kv_cache.hpp"
#include "ratplus/nn/config.hpp"
#include "ratplus/nn/feed_forward.hpp"
#include "ratplus/nn/mixer.hpp"
#include "ratplus/ops/embed.hpp"
#include "ratplus/ops/loss.hpp"
#include "ratplus/ops/memory.hpp"
#include "ratplus/ops/rope.hpp"

namespace ratplus {

/// Tokens and labels of a training or evaluation step, (B, T), in host memory. A label is a token or ignored_label.
struct token_batch {
  view<const token_t, 2> tokens, labels;
};

/// Number of labels that count.
[[nodiscard]] inline index_t counted_labels(view<const token_t, 2> labels) {
  index_t n = 0;
  for (index_t b = 0; b < labels.extent(0); ++b)
    for (index_t t = 0; t < labels.extent(1); ++t) n += labels(b, t) != ignored_label;
  return n;
}

/// T: type of products and activations. Parameters, gradients and the residual stream are held in accumulator_t<T>. A
/// model may be used by one thread at a time: it keeps its activations between calls.
template <class C, class T = float, class Space = host_space>
class language_model {
  static_assert((require_cell<C>(), true));

 public:
  using scalar = T;
  using A = accumulator_t<T>;
  using cell_type = C;
  using space = Space;

  /// Parameters are uninitialised until `initialise`, or until they are written and `parameters_changed` is called.
  /// Throws value_error on a config that describes no model.
  template <Context Ctx>
  requires std::same_as<typename Ctx::space, Space> language_model(Ctx& ctx, const model_config& config,
                                                                   C cell = default_cell())
      : config_((validate(config), config)), cell_(cell), layout_(config, C::gated), master_(layout_.size()) {
    fill(ctx, master_.view(), A(0));
    if constexpr (!std::same_as<T, A>) products_ = tensor<T, 1, Space>(layout_.size());
  }

  [[nodiscard]] const model_config& config() const { return config_; }
  [[nodiscard]] const C& cell() const { return cell_; }
  [[nodiscard]] const parameter_layout& layout() const { return layout_; }

  /// The parameters, flat, in `layout`'s order. Call `parameters_changed` after writing.
  [[nodiscard]] view<A, 1> parameters() { return master_; }
  [[nodiscard]] view<const A, 1> parameters() const { return master_; }

  /// Makes the copies that products read. Needed after every change of `parameters()`.
  template <Context Ctx>
  void parameters_changed(Ctx& ctx) {
    if constexpr (!std::same_as<T, A>) copy(ctx, std::as_const(master_).view(), products_.view());
  }

  /// Normal weights, mean 0, deviation 0.02; norms 1. The same seed gives the same weights on every backend.
  template <Context Ctx>
  void initialise(Ctx& ctx, std::uint64_t seed) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<double> normal(0.0, 0.02);
    std::vector<A> host(static_cast<std::size_t>(layout_.size()), A(0));
    for (const auto& e : layout_.entries())
      for (index_t i = 0; i < e.size(); ++i)
        host[static_cast<std::size_t>(e.offset + i)] = e.is_norm() ? A(1) : static_cast<A>(normal(engine));
    upload(ctx, static_cast<const A*>(host.data()), parameters());
    parameters_changed(ctx);
  }

  /// Zero gradients, laid out like the parameters.
  template <Context Ctx>
  [[nodiscard]] tensor<A, 1, Space> make_gradients(Ctx& ctx) const {
    tensor<A, 1, Space> g(layout_.size());
    fill(ctx, g.view(), A(0));
    return g;
  }

  /// tokens (B, T) in host memory → logits (B, T, V), written, in the model's space.
  template <Context Ctx, class S>
  void forward(Ctx& ctx, const S& schedule, view<const token_t, 2> tokens, view<A, 3> logits) {
    require_schedule<S>();
    const batch_shape s = check_tokens(tokens);
    ratplus::detail::check_shape("forward", "logits", logits, {{s.batch, s.rows, config_.vocab_size}});
    workspace& w = prepare(s, false);
    upload_tokens(ctx, tokens, w.tokens);
    run_blocks(ctx, schedule, w, nullptr_cache(), {});
    head(ctx, w.stream(config_.num_layers), w.normed, flat_rows(logits));
  }

  /// The same, returning the logits.
  template <Context Ctx, class S>
  [[nodiscard]] tensor<A, 3, Space> forward(Ctx& ctx, const S& schedule, view<const token_t, 2> tokens) {
    require_schedule<S>();
    tensor<A, 3, Space> logits(tokens.extent(0), tokens.extent(1), config_.vocab_size);
    forward(ctx, schedule, tokens, logits.view());
    return logits;
  }

  /// Mean cross-entropy in nats over the labels that count. `weight` replaces 1 / their number (for a mean over several
  /// batches).
  template <Context Ctx, class S>
  [[nodiscard]] double loss(Ctx& ctx, const S& schedule, const token_batch& batch,
                            std::optional<double> weight = std::nullopt) {
    require_schedule<S>();
    workspace& w = prepare_labelled(ctx, batch, false);
    run_blocks(ctx, schedule, w, nullptr_cache(), {});
    return head_loss(ctx, w, weight.value_or(mean_weight(batch)), nullptr);
  }

  /// The same, and the gradient of what it returns, added to `gradients` (laid out like the parameters).
  template <Context Ctx, class S>
  [[nodiscard]] double loss_and_gradients(Ctx& ctx, const S& schedule, const token_batch& batch, view<A, 1> gradients,
                                          std::optional<double> weight = std::nullopt) {
    require_schedule<S>();
    ratplus::detail::check_shape("loss_and_gradients", "gradients", gradients, {{layout_.size()}});
    workspace& w = prepare_labelled(ctx, batch, true);
    run_blocks(ctx, schedule, w, nullptr_cache(), {});
    const model_weights<A> dw = layout_.weights(gradients, gradients);
    const double loss = head_loss(ctx, w, weight.value_or(mean_weight(batch)), &dw);
    run_backward(ctx, schedule, w, dw);
    return loss;
  }

  /// Appends tokens (B, n), host memory, to the cache's sequences — a prefill, a piece of one, or one decoding step —
  /// and writes the logits of every row, (B, n, V). lengths (B), host: sequence b takes its first lengths[b] tokens
  /// only (0: none); its other rows of logits are of no meaning. Throws cache_full, before anything is changed, when a
  /// sequence would outgrow the cache.
  template <Context Ctx, class S, class KV>
  void extend(Ctx& ctx, const S& schedule, kv_cache<KV, Space, A>& cache, view<const token_t, 2> tokens,
              std::optional<std::vector<token_t>> lengths, view<A, 3> logits) {
    require_schedule<S>();
    const batch_shape s = check_tokens(tokens);
    ratplus::detail::check_shape("extend", "logits", logits, {{s.batch, s.rows, config_.vocab_size}});
    workspace& w = extend_blocks(ctx, schedule, cache, tokens, s, lengths);
    head(ctx, w.stream(config_.num_layers), w.normed, flat_rows(logits));
  }

  /// The same, writing the logits (B, V) after each sequence's last new token alone.
  template <Context Ctx, class S, class KV>
  void extend(Ctx& ctx, const S& schedule, kv_cache<KV, Space, A>& cache, view<const token_t, 2> tokens,
              std::optional<std::vector<token_t>> lengths, view<A, 2> logits) {
    require_schedule<S>();
    const batch_shape s = check_tokens(tokens);
    ratplus::detail::check_shape("extend", "logits", logits, {{s.batch, config_.vocab_size}});
    workspace& w = extend_blocks(ctx, schedule, cache, tokens, s, lengths);
    view<A, 2> rows = w.stream(config_.num_layers);
    if (s.rows > 1) {
      tensor<A, 2, Space> last(s.batch, config_.d_model);
      for (index_t b = 0; b < s.batch; ++b) {
        const index_t n = lengths ? (*lengths)[static_cast<std::size_t>(b)] : s.rows;
        const index_t row = b * s.rows + std::max<index_t>(n, 1) - 1;
        copy(ctx, view<const A, 2>(rows).slice(0, row, row + 1), last.view().slice(0, b, b + 1));
      }
      head(ctx, last.view(), w.normed.view().slice(0, 0, s.batch), logits);
    } else {
      head(ctx, rows, w.normed, logits);
    }
  }

  /// One decoding step that never leaves the model's space, for replaying (ops/replay.hpp): tokens (B) and active (B),
  /// 1 or 0, lie there; sequences with active[b] = 0 stay where they are. Call cache.grow(active) first: only the host
  /// can refuse.
  template <Context Ctx, class S, class KV>
  void decode_step(Ctx& ctx, const S& schedule, kv_cache<KV, Space, A>& cache, view<const token_t, 1> tokens,
                   view<const token_t, 1> active, view<A, 2> logits) {
    require_schedule<S>();
    const batch_shape s{cache.batch(), 1};
    ratplus::detail::check_shape("decode_step", "tokens", tokens, {{s.batch}});
    ratplus::detail::check_shape("decode_step", "active", active, {{s.batch}});
    ratplus::detail::check_shape("decode_step", "logits", logits, {{s.batch, config_.vocab_size}});
    workspace& w = prepare(s, false);
    copy(ctx, tokens, w.tokens.view());
    run_blocks(ctx, schedule, w, &cache, active);
    cache.grow_there(ctx, active, 1);
    head(ctx, w.stream(config_.num_layers), w.normed, logits);
  }

 private:
  struct block_tape {
    mixer_tape<T, Space> mixer;
    tensor<A, 2, Space> middle;  // (N, d), the stream between mixer and feed-forward
    feed_forward_tape<T, Space> feed_forward;
  };

  /// Activations of one shape. Inference uses one tape and one residual stream for all layers, training one per layer:
  /// a token of training keeps, per layer, 8 d + F scalars T (projections, scanned keys and values, attention's output,
  /// the feed-forward's hidden channels) and 2 d of A (two residual streams), and H + 2 statistics. With bfloat16 and
  /// F = 4 d that is 32 d bytes: 1.5 MiB for 24 layers of d = 2048.
  struct workspace {
    batch_shape shape;
    bool training = false;
    tensor<token_t, 1, Space> tokens, labels;  // (N)
    tensor<token_t, 1, Space> lengths;         // (B)
    std::vector<tensor<A, 2, Space>> streams;  // (N, d), input of each block and output of the last
    std::vector<block_tape> tapes;
    tensor<T, 2, Space> normed, activated;             // (N, d), (N, F)
    tensor<A, 1, Space> rstd;                          // (N), of the last norm
    tensor<double, 1, Space> loss;                     // (1)
    tensor<A, 2, Space> dstream;                       // these in training only
    tensor<T, 2, Space> dnormed, dhidden, dprojected;  // like normed, hidden, projected

    workspace(const model_config& c, batch_shape s, bool train) : shape(s), training(train) {
      const index_t N = s.count(), layers = train ? c.num_layers : 1;
      tokens = tensor<token_t, 1, Space>(N);
      labels = tensor<token_t, 1, Space>(N);
      lengths = tensor<token_t, 1, Space>(s.batch);
      for (index_t i = 0; i < layers; ++i)
        tapes.push_back({mixer_tape<T, Space>(c, C::gated, s), tensor<A, 2, Space>(N, c.d_model),
                         feed_forward_tape<T, Space>(c, N)});
      for (index_t i = 0; i < (train ? layers + 1 : 1); ++i) streams.emplace_back(extents<2>{{N, c.d_model}});
      normed = tensor<T, 2, Space>(N, c.d_model);
      activated = tensor<T, 2, Space>(N, c.d_ffn);
      rstd = tensor<A, 1, Space>(N);
      loss = tensor<double, 1, Space>(1);
      if (!train) return;
      dstream = tensor<A, 2, Space>(N, c.d_model);
      dnormed = tensor<T, 2, Space>(N, c.d_model);
      dhidden = tensor<T, 2, Space>(N, c.d_ffn);
      dprojected = tensor<T, 2, Space>(tapes[0].mixer.projected.shape());
    }

    view<A, 2> stream(index_t layer) { return streams[training ? static_cast<std::size_t>(layer) : 0]; }
    block_tape& tape(index_t layer) { return tapes[training ? static_cast<std::size_t>(layer) : 0]; }
  };

  using no_cache = kv_cache<T, Space, A>*;
  static no_cache nullptr_cache() { return nullptr; }

  static C default_cell() requires std::default_initializable<C> { return C{}; }

  static view<A, 2> flat_rows(view<A, 3> x) { return {x.data(), {{x.extent(0) * x.extent(1), x.extent(2)}}}; }

  [[nodiscard]] model_weights<const T> weights() const {
    if constexpr (std::same_as<T, A>)
      return layout_.weights(view<const T, 1>(master_), master_);
    else
      return layout_.weights(view<const T, 1>(products_), master_);
  }

  batch_shape check_tokens(view<const token_t, 2> tokens) const {
    for (index_t b = 0; b < tokens.extent(0); ++b)
      for (index_t t = 0; t < tokens.extent(1); ++t)
        if (tokens(b, t) < 0 || tokens(b, t) >= config_.vocab_size)
          throw value_error(message("tokens: id ", tokens(b, t), " at (", b, ", ", t, ") is outside the vocabulary of ",
                                    config_.vocab_size));
    if (tokens.size() == 0)
      throw shape_error(message("tokens: shape ", ratplus::detail::shape_text(tokens.shape()), " is empty"));
    return {tokens.extent(0), tokens.extent(1)};
  }

  static double mean_weight(const token_batch& batch) {
    const index_t n = counted_labels(batch.labels);
    if (n == 0) throw value_error("loss: no label counts");
    return 1.0 / static_cast<double>(n);
  }

  workspace& prepare(batch_shape s, bool training) {
    if (!workspace_ || !(workspace_->shape == s) || workspace_->training != training) {
      workspace_.reset();  // first, so that the two never exist at once
      workspace_ = std::make_unique<workspace>(config_, s, training);
    }
    return *workspace_;
  }

  template <Context Ctx>
  workspace& prepare_labelled(Ctx& ctx, const token_batch& batch, bool training) {
    const batch_shape s = check_tokens(batch.tokens);
    ratplus::detail::check_shape("loss", "labels", batch.labels, batch.tokens.shape());
    for (index_t b = 0; b < s.batch; ++b)
      for (index_t t = 0; t < s.rows; ++t)
        if (const token_t id = batch.labels(b, t); id != ignored_label && (id < 0 || id >= config_.vocab_size))
          throw value_error(
              message("labels: id ", id, " at (", b, ", ", t, ") is outside the vocabulary of ", config_.vocab_size));
    workspace& w = prepare(s, training);
    upload_tokens(ctx, batch.tokens, w.tokens);
    upload_tokens(ctx, batch.labels, w.labels);
    return w;
  }

  template <Context Ctx>
  static void upload_tokens(Ctx& ctx, view<const token_t, 2> host, tensor<token_t, 1, Space>& there) {
    for (index_t b = 0; b < host.extent(0); ++b) {
      const index_t n = host.extent(1);
      upload(ctx, host.row(b), there.view().slice(0, b * n, (b + 1) * n));
    }
  }

  /// Angles of positions below `positions`.
  template <Context Ctx>
  view<const A, 2> rope(Ctx& ctx, index_t positions) {
    if (rope_.extent(0) < positions)
      rope_ = make_rope_table<A>(ctx, std::max(positions, std::min(config_.max_seq_len, 2 * positions)),
                                 config_.head_size(), config_.rope_base);
    return std::as_const(rope_);
  }

  /// Embeds w.tokens and runs every block; the result is w.stream(num_layers).
  template <Context Ctx, Schedule S, class Cache>
  void run_blocks(Ctx& ctx, const S& schedule, workspace& w, Cache* cache, view<const token_t, 1> lengths) {
    const model_weights<const T> all = weights();
    const auto angles = rope(ctx, cache ? cache->capacity() : w.shape.rows);
    embed_forward<Ctx, A>(ctx, std::as_const(w.tokens), all.embedding, w.stream(0));
    for (index_t i = 0; i < config_.num_layers; ++i) {
      const auto& weights_i = all.blocks[static_cast<std::size_t>(i)];
      block_tape& tape = w.tape(i);
      auto memory = decltype(cache->template memory<T>(i, lengths)){};
      if (cache) memory = cache->template memory<T>(i, lengths);
      visit_layer(schedule, i, [&](const auto& heads) {
        mixer_forward<Ctx>(ctx, cell_, heads, config_, w.shape, weights_i.mixer, angles, w.stream(i), memory,
                           w.training, tape.mixer, w.normed.view(), tape.middle.view());
      });
      feed_forward_forward<Ctx, T>(ctx, weights_i.feed_forward, std::as_const(tape.middle), tape.feed_forward, w.normed,
                                   w.activated, w.stream(i + 1));
    }
  }

  /// w.dstream: the gradient of the last stream. Adds the blocks' and the embedding's weight gradients.
  template <Context Ctx, Schedule S>
  void run_backward(Ctx& ctx, const S& schedule, workspace& w, const model_weights<A>& dw) {
    const model_weights<const T> all = weights();
    const auto angles = rope(ctx, w.shape.rows);
    for (index_t i = config_.num_layers - 1; i >= 0; --i) {
      const auto at = static_cast<std::size_t>(i);
      block_tape& tape = w.tape(i);
      feed_forward_backward<Ctx, T>(ctx, all.blocks[at].feed_forward, std::as_const(tape.middle), tape.feed_forward,
                                    w.dstream, dw.blocks[at].feed_forward, w.normed, w.dnormed, w.activated, w.dhidden);
      visit_layer(schedule, i, [&](const auto& heads) {
        mixer_backward<Ctx>(ctx, cell_, heads, config_, w.shape, all.blocks[at].mixer, angles, w.stream(i), tape.mixer,
                            w.dstream.view(), dw.blocks[at].mixer, w.dprojected.view(), w.normed.view(),
                            w.dnormed.view());
      });
    }
    embed_backward<Ctx, A>(ctx, std::as_const(w.tokens), std::as_const(w.dstream), dw.embedding);
  }

  /// logits (N, V) = RMSNorm(x; w_f) · Eᵀ.
  template <Context Ctx>
  void head(Ctx& ctx, view<const A, 2> x, view<T, 2> normed, view<A, 2> logits) {
    const model_weights<const T> all = weights();
    norm_matmul(ctx, norm_matmul_args<T, A>{.x = x, .norm = all.norm, .b = all.head, .normed = normed, .c = logits});
  }

  /// The loss of the last stream; with `dw` also w.dstream and the head's weight gradients. Logits exist for a chunk of
  /// rows at a time.
  template <Context Ctx>
  double head_loss(Ctx& ctx, workspace& w, double weight, const model_weights<A>* dw) {
    constexpr index_t most_logits = index_t{1} << 25;
    const index_t N = w.shape.count(), V = config_.vocab_size;
    const index_t chunk = std::clamp<index_t>(most_logits / V, 1, N);
    const model_weights<const T> all = weights();
    const view<const A, 2> x = w.stream(config_.num_layers);
    if (logits_.size() < chunk * V) logits_ = tensor<T, 1, Space>(chunk * V);
    rms_norm_forward(ctx, rms_norm_forward_args<T>{.x = x, .weight = all.norm, .y = w.normed, .rstd = w.rstd});
    fill(ctx, w.loss.view(), 0.0);
    for (index_t begin = 0; begin < N; begin += chunk) {
      const index_t end = std::min(begin + chunk, N);
      const view<const T, 2> normed = std::as_const(w.normed).view().slice(0, begin, end);
      const view<T, 2> logits = as_view(logits_.data(), end - begin, V);
      matmul(ctx, matmul_args<T>{.a = normed, .b = all.head, .c = logits, .transpose_b = true});
      cross_entropy(ctx, cross_entropy_args<T>{.logits = logits,
                                               .labels = std::as_const(w.labels).view().slice(0, begin, end),
                                               .weight = weight,
                                               .loss = w.loss,
                                               .dlogits = dw ? logits : view<T, 2>{}});
      if (!dw) continue;
      matmul(ctx, matmul_args<T, A>{.a = logits, .b = normed, .c = dw->head, .addend = dw->head, .transpose_a = true});
      matmul(ctx, matmul_args<T>{.a = logits, .b = all.head, .c = w.dnormed.view().slice(0, begin, end)});
    }
    if (dw) {
      fill(ctx, w.dstream.as(w.dstream.size()), A(0));
      rms_norm_backward(
          ctx, rms_norm_backward_args<T>{
                   .x = x, .weight = all.norm, .rstd = w.rstd, .dy = w.dnormed, .dx = w.dstream, .dweight = dw->norm});
    }
    double loss = 0;
    download(ctx, std::as_const(w.loss).view(), &loss);
    return loss;
  }

  template <Context Ctx, Schedule S, class KV>
  workspace& extend_blocks(Ctx& ctx, const S& schedule, kv_cache<KV, Space, A>& cache, view<const token_t, 2> tokens,
                           batch_shape s, const std::optional<std::vector<token_t>>& lengths) {
    if (s.batch != cache.batch())
      throw shape_error(message("extend: tokens of ", s.batch, " sequences, the cache has ", cache.batch()));
    if (lengths) {
      if (static_cast<index_t>(lengths->size()) != s.batch)
        throw shape_error(message("extend: ", lengths->size(), " lengths for ", s.batch, " sequences"));
      for (std::size_t b = 0; b < lengths->size(); ++b)
        if ((*lengths)[b] < 0 || (*lengths)[b] > s.rows)
          throw value_error(
              message("extend: length ", (*lengths)[b], " of sequence ", b, " is outside [0, ", s.rows, "]"));
    }
    const std::vector<token_t> grown =
        lengths ? *lengths : std::vector<token_t>(static_cast<std::size_t>(s.batch), static_cast<token_t>(s.rows));
    cache.check_serves(schedule);
    cache.grow(grown);
    workspace& w = prepare(s, false);
    upload_tokens(ctx, tokens, w.tokens);
    view<const token_t, 1> lengths_there;
    if (lengths) {
      upload(ctx, grown.data(), w.lengths.view());
      lengths_there = w.lengths;
    }
    run_blocks(ctx, schedule, w, &cache, lengths_there);
    cache.grow_there(ctx, lengths_there, s.rows);
    return w;
  }

  model_config config_;
  [[no_unique_address]] C cell_;
  parameter_layout layout_;
  tensor<A, 1, Space> master_;
  tensor<T, 1, Space> products_;  // the parameters in T, when that is not A
  tensor<A, 2, Space> rope_;
  tensor<T, 1, Space> logits_;  // a chunk of them
  std::unique_ptr<workspace> workspace_;
};

}  // namespace ratplus
