#pragma once
// What decoding carries from position to position: for every layer the keys and values its pattern still sees — S + W +
// T/D of them, in slots (pattern/residency.hpp) — and one state k̃, ṽ before RoPE; for every sequence the number of its
// positions. (SPEC §3)

#include <vector>

#include "ratplus/nn/config.hpp"
#include "ratplus/nn/mixer.hpp"
#include "ratplus/pattern/parse.hpp"

namespace ratplus {

/// KV is the type of the cached keys and values (float, or bfloat16 for half the memory and traffic); A of the states.
template <class KV = float, class Space = host_space, class A = accumulator_t<KV>>
class kv_cache {
 public:
  /// For `batch` sequences of up to `positions` positions each, kept under `kept`: it answers that schedule and every
  /// one whose keys it holds (`serves`).
  template <Context Ctx, class S>
  requires std::same_as<typename Ctx::space, Space> kv_cache(Ctx& ctx, const model_config& config, const S& kept,
                                                             index_t batch, index_t positions)
      : positions_(positions), first_(static_cast<std::size_t>(batch), token_t{0}), first_there_(batch) {
    require_schedule<S>();
    if (batch < 1) throw value_error(message("cache: batch of ", batch, " sequences"));
    if (positions < 1) throw value_error(message("cache: capacity of ", positions, " positions"));
    const index_t H = config.num_heads, d = config.head_size();
    for (index_t i = 0; i < config.num_layers; ++i) {
      layer one;
      visit_layer(kept, i, [&](const auto& heads) { one.heads = slots_of_heads(heads, H, positions); });
      const index_t slots = pool_slots(one.heads);
      one.heads_there = tensor<head_slots, 1, Space>(H);
      upload(ctx, static_cast<const head_slots*>(one.heads.data()), one.heads_there.view());
      // A pattern may keep nothing (a window of 0): one slot, never used, keeps the views given.
      one.k_pool = tensor<KV, 3, Space>(batch, slots > 0 ? slots : 1, d);
      one.v_pool = tensor<KV, 3, Space>(one.k_pool.shape());
      one.k_state = tensor<A, 3, Space>(batch, H, d);
      one.v_state = tensor<A, 3, Space>(batch, H, d);
      layers_.push_back(std::move(one));
    }
    for (layer& one : layers_) {
      fill(ctx, one.k_pool.as(one.k_pool.size()), KV{});
      fill(ctx, one.v_pool.as(one.v_pool.size()), KV{});
    }
    for (index_t b = 0; b < batch; ++b) reset(ctx, b);
  }

  [[nodiscard]] index_t batch() const { return static_cast<index_t>(first_.size()); }
  /// Positions a sequence may grow to.
  [[nodiscard]] index_t capacity() const { return positions_; }
  /// Positions sequence b has.
  [[nodiscard]] index_t position(index_t b) const { return first_[static_cast<std::size_t>(b)]; }

  /// Bytes of keys, values and states, all layers and sequences.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t n = 0;
    for (const layer& one : layers_)
      n += one.k_pool.bytes() + one.v_pool.bytes() + one.k_state.bytes() + one.v_state.bytes();
    return n;
  }

  /// Starts sequence b anew, at position 0.
  template <Context Ctx>
  void reset(Ctx& ctx, index_t b) {
    first_[static_cast<std::size_t>(b)] = 0;
    for (layer& one : layers_) {
      const index_t state = one.k_state.extent(1) * one.k_state.extent(2);
      fill(ctx, as_view(one.k_state.data() + b * state, state), A(0));
      fill(ctx, as_view(one.v_state.data() + b * state, state), A(0));
    }
    publish(ctx);
  }

  /// Throws value_error when a query under `asked` would see a key that is not kept.
  template <Schedule S>
  void check_serves(const S& asked) const {
    for (std::size_t i = 0; i < layers_.size(); ++i)
      visit_layer(asked, static_cast<index_t>(i), [&](const auto& heads) {
        const auto H = static_cast<index_t>(layers_[i].heads.size());
        check_heads(heads, H);
        for (index_t h = 0; h < H; ++h) {
          const any_sparse& kept = layers_[i].heads[static_cast<std::size_t>(h)].where.kept();
          const any_sparse want = visit_head(heads, h, H, [](const auto& p) { return kept_pattern(p); });
          if (!serves(kept, want))
            throw value_error(message("cache: layer ", i, " head ", h, " keeps ", to_string(kept),
                                      ", which does not hold the keys of ", to_string(want)));
        }
      });
  }

  /// Throws cache_full unless each sequence b has room for lengths[b] more positions.
  void check_room(const std::vector<token_t>& lengths) const {
    for (index_t b = 0; b < batch(); ++b)
      if (position(b) + lengths[static_cast<std::size_t>(b)] > positions_)
        throw cache_full(message("cache: sequence ", b, " is at position ", position(b), " of ", positions_, ", ",
                                 lengths[static_cast<std::size_t>(b)], " more do not fit"));
  }

  /// What the mixer of a layer reads and writes. `length` (B), in the cache's space, or absent.
  template <class T>
  [[nodiscard]] core_memory<T, KV> memory(index_t layer_index, view<const token_t, 1> length) {
    layer& one = layers_[static_cast<std::size_t>(layer_index)];
    return {one.k_pool,  one.v_pool,  std::as_const(one.heads_there),       one.heads.data(),
            one.k_state, one.v_state, {std::as_const(first_there_), length}};
  }

  /// Positions of the sequences' next rows, (B), in the cache's space.
  [[nodiscard]] view<const token_t, 1> positions_there() const { return first_there_; }

  /// The sequences grow by `lengths`, as far as the host counts; the rows that a step appends on the device count
  /// there. Throws cache_full.
  void grow(const std::vector<token_t>& lengths) {
    check_room(lengths);
    for (std::size_t b = 0; b < first_.size(); ++b) first_[b] += lengths[b];
  }

  /// The same where the cache lies: `length` (B) in its space, or `rows` for every sequence.
  template <Context Ctx>
  void grow_there(Ctx& ctx, view<const token_t, 1> length, index_t rows) {
    cache_advance(ctx, first_there_.view(), length, static_cast<token_t>(rows));
  }

 private:
  struct layer {
    std::vector<head_slots> heads;
    tensor<head_slots, 1, Space> heads_there;
    tensor<KV, 3, Space> k_pool, v_pool;
    tensor<A, 3, Space> k_state, v_state;
  };

  template <Context Ctx>
  void publish(Ctx& ctx) {
    upload(ctx, static_cast<const token_t*>(first_.data()), first_there_.view());
  }

  index_t positions_;
  std::vector<token_t> first_;
  tensor<token_t, 1, Space> first_there_;
  std::vector<layer> layers_;
};

}  // namespace ratplus
