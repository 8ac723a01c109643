#pragma once
// Buffers of a context that know when they are misused. The elements of a view lie among canaries (before, behind, and
// between the rows of a strided view), checked bit by bit whenever the buffer is read back; outputs begin as poison
// (NaN), so that an element nobody wrote cannot pass a comparison.

#include <cstring>
#include <limits>
#include <stdexcept>

#include "ratplus/ops/memory.hpp"
#include "support/array.hpp"
#include "support/compare.hpp"

namespace ratplus_tests {

struct broken_guard : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// packed: contiguous. strided: rank 4 (B, H, T, d) as the heads of one slice of a (B, T, 5·H·d) projection, other
/// ranks with gaps of odd size after every row.
enum class layout { packed, strided };

/// A value that no operation produces and no comparison accepts.
template <class T>
[[nodiscard]] T poison() {
  if constexpr (std::is_same_v<T, bfloat16>)
    return bfloat16(std::numeric_limits<float>::quiet_NaN());
  else if constexpr (std::is_floating_point_v<T>)
    return std::numeric_limits<T>::quiet_NaN();
  else
    return std::numeric_limits<T>::min();
}

template <class Ctx, class T, int R>
class guarded {
  using space = typename Ctx::space;

 public:
  guarded(Ctx& ctx, const array<T, R>& values, layout where = layout::packed) : ctx_(&ctx), shape_(values.shape) {
    static_assert(std::is_trivially_copyable_v<T>);
    const index_t extent = place(where);
    image_.resize(static_cast<std::size_t>(extent + 2 * margin));
    auto* bytes = reinterpret_cast<unsigned char*>(image_.data());
    for (std::size_t i = 0; i < image_.size() * sizeof(T); ++i) bytes[i] = static_cast<unsigned char>(0xa5 ^ (i * 37));
    inside_.resize(image_.size());
    std::size_t next = 0;
    for_each_index(shape_, [&](const extents<R>& at) {
      const std::size_t i = position(at);
      image_[i] = values.data[next++];
      inside_[i] = true;
    });
    memory_ = ratplus::make_tensor<T, space>(image_.size());
    upload(ctx, static_cast<const T*>(image_.data()), memory_.as(memory_.size()));
  }

  [[nodiscard]] ratplus::view<T, R> out() { return {memory_.data() + begin_, shape_, stride_}; }
  [[nodiscard]] ratplus::view<const T, R> in() const { return {memory_.data() + begin_, shape_, stride_}; }

  /// The elements now. Throws broken_guard when a canary changed.
  [[nodiscard]] array<T, R> read() const {
    std::vector<T> now(image_.size());
    ctx_->synchronize();
    download(*ctx_, std::as_const(memory_).as(memory_.size()), now.data());
    for (std::size_t i = 0; i < now.size(); ++i)
      if (!inside_[i] && std::memcmp(&now[i], &image_[i], sizeof(T)) != 0)
        throw broken_guard("a write outside the view, " + std::to_string(static_cast<index_t>(i) - begin_) +
                           " elements from its first");
    array<T, R> a(shape_);
    std::size_t next = 0;
    for_each_index(shape_, [&](const extents<R>& at) { a.data[next++] = now[position(at)]; });
    return a;
  }

 private:
  static constexpr index_t margin = 64;

  /// Chooses strides and the first element; returns the extent between the margins.
  index_t place(layout where) {
    begin_ = margin;
    if constexpr (R == 4) {
      if (where == layout::strided) {
        const index_t slice = shape_[1] * shape_[3];
        stride_ = {{shape_[2] * 5 * slice, shape_[3], 5 * slice, 1}};
        begin_ += 2 * slice;
        return shape_[0] * shape_[2] * 5 * slice;
      }
    }
    index_t stride = 1;
    for (int i = R - 1; i >= 0; --i) {
      stride_[i] = stride;
      stride = stride * shape_[i] + (where == layout::strided ? 3 : 0);
    }
    return stride;
  }

  [[nodiscard]] std::size_t position(const extents<R>& at) const {
    index_t i = begin_;
    for (int n = 0; n < R; ++n) i += at[n] * stride_[n];
    return static_cast<std::size_t>(i);
  }

  Ctx* ctx_;
  extents<R> shape_, stride_;
  index_t begin_ = 0;
  std::vector<T> image_;  // as uploaded
  std::vector<bool> inside_;
  ratplus::tensor<T, 1, space> memory_;
};

/// An output: every element poison.
template <class T, class Ctx, int R>
[[nodiscard]] guarded<Ctx, T, R> poisoned(Ctx& ctx, extents<R> shape, layout where = layout::packed) {
  return {ctx, array<T, R>(shape, poison<T>()), where};
}

}  // namespace ratplus_tests
