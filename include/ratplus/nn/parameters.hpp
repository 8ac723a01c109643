#pragma once
// The parameters of a model as one flat buffer: the optimiser, the gradient norm and the conversion to a lower
// precision are then one operation each. The layout names every tensor as checkpoints do (SPEC §6) and is the only
// place that knows their order.

#include <string>
#include <type_traits>
#include <vector>

#include "ratplus/core/scalar.hpp"
#include "ratplus/core/tensor.hpp"
#include "ratplus/nn/config.hpp"

namespace ratplus {

/// Type of the parameters that no product of T reads.
template <class T>
using master_t = std::conditional_t<std::is_const_v<T>, const accumulator_t<T>, accumulator_t<T>>;

template <class T>
struct mixer_weights {
  view<master_t<T>, 1> norm;  // (d)
  view<T, 2> in_proj;         // (5d, d): o, q, k, v, g; (4d, d) for a cell without a gate
  view<T, 2> out_proj;        // (d, d)
};

template <class T>
struct feed_forward_weights {
  view<master_t<T>, 1> norm;  // (d)
  view<T, 2> fc1;             // (F, d)
  view<T, 2> fc2;             // (d, F)
};

template <class T>
struct block_weights {
  mixer_weights<T> mixer;
  feed_forward_weights<T> feed_forward;
};

template <class T>
struct model_weights {
  view<master_t<T>, 2> embedding;  // (V, d)
  view<T, 2> head;                 // (V, d), the embedding as a factor of products
  std::vector<block_weights<T>> blocks;
  view<master_t<T>, 1> norm;  // (d)
};

class parameter_layout {
 public:
  struct entry {
    std::string name;
    std::vector<index_t> shape;  // one or two extents
    index_t offset;              // in the flat buffer, in elements

    [[nodiscard]] index_t size() const { return shape.size() == 2 ? shape[0] * shape[1] : shape[0]; }
    [[nodiscard]] bool is_norm() const { return shape.size() == 1; }
  };

  /// `gated`: the cell's; decides the rows of in_proj.
  parameter_layout(const model_config& c, bool gated) {
    add("embedding.wte.weight", {c.vocab_size, c.d_model});
    for (index_t i = 0; i < c.num_layers; ++i) {
      const std::string layer = message("backbone.layers.", i, ".");
      add(layer + "seq_layer.input_norm.weight", {c.d_model});
      add(layer + "seq_layer.in_proj.weight", {(gated ? 5 : 4) * c.d_model, c.d_model});
      add(layer + "seq_layer.out_proj.weight", {c.d_model, c.d_model});
      add(layer + "hidden_layer.ln.weight", {c.d_model});
      add(layer + "hidden_layer.fc1.weight", {c.d_ffn, c.d_model});
      add(layer + "hidden_layer.fc2.weight", {c.d_model, c.d_ffn});
    }
    add("backbone.ln.weight", {c.d_model});
  }

  [[nodiscard]] const std::vector<entry>& entries() const { return entries_; }
  /// Elements of the flat buffer. Tensors start at multiples of `alignment`; the gaps hold zeros and stay zero.
  [[nodiscard]] index_t size() const { return size_; }
  /// Number of trained parameters.
  [[nodiscard]] index_t count() const {
    index_t n = 0;
    for (const entry& e : entries_) n += e.size();
    return n;
  }

  /// Views of the tensors in flat buffers of this layout: what products read in `products`, the others in `master`. The
  /// two may be one.
  template <class T>
  [[nodiscard]] model_weights<T> weights(view<T, 1> products, view<master_t<T>, 1> master) const {
    std::size_t next = 0;
    const auto vector = [&] {
      const entry& e = entries_[next++];
      return as_view(master.data() + e.offset, e.shape[0]);
    };
    const auto matrix = [&] {
      const entry& e = entries_[next++];
      return as_view(products.data() + e.offset, e.shape[0], e.shape[1]);
    };
    model_weights<T> w;
    w.head = matrix();
    w.embedding = {master.data() + entries_[0].offset, w.head.shape()};
    while (next + 1 < entries_.size()) {
      block_weights<T> b;
      b.mixer.norm = vector();
      b.mixer.in_proj = matrix();
      b.mixer.out_proj = matrix();
      b.feed_forward.norm = vector();
      b.feed_forward.fc1 = matrix();
      b.feed_forward.fc2 = matrix();
      w.blocks.push_back(b);
    }
    w.norm = vector();
    return w;
  }

 private:
  static constexpr index_t alignment = 64;

  void add(std::string name, std::vector<index_t> shape) {
    entries_.push_back({std::move(name), std::move(shape), size_});
    size_ += (entries_.back().size() + alignment - 1) / alignment * alignment;
  }

  std::vector<entry> entries_;
  index_t size_ = 0;
};

}  // namespace ratplus
