#pragma once
// view<T, Rank>: a window onto memory owned by somebody else. Rows may lie anywhere (strides are free), the channels of
// one row are contiguous (the last stride is 1). So a slice of a projection, the heads of a row or every D-th key are
// views: nothing is ever gathered. Cheap to copy, passed by value, usable in kernels.

#include <array>
#include <type_traits>

#include "ratplus/core/host_device.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus {

template <int Rank>
struct extents {
  index_t at[Rank] = {};

  RATPLUS_HD constexpr index_t operator[](int dim) const { return at[dim]; }
  RATPLUS_HD constexpr index_t& operator[](int dim) { return at[dim]; }

  /// Number of elements.
  RATPLUS_HD constexpr index_t product() const {
    index_t n = 1;
    for (int i = 0; i < Rank; ++i) n *= at[i];
    return n;
  }

  RATPLUS_HD friend constexpr bool operator==(const extents& a, const extents& b) {
    for (int i = 0; i < Rank; ++i)
      if (a.at[i] != b.at[i]) return false;
    return true;
  }
};

template <class... N>
extents(N...) -> extents<static_cast<int>(sizeof...(N))>;

template <class T, int Rank>
class view {
 public:
  using value_type = std::remove_const_t<T>;
  using element_type = T;
  static constexpr int rank = Rank;

  /// Absent: no memory, every extent 0.
  view() = default;

  /// Contiguous, row-major.
  RATPLUS_HD constexpr view(T* data, extents<Rank> shape) : data_(data), shape_(shape) {
    index_t stride = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      stride_[i] = stride;
      stride *= shape[i];
    }
  }

  /// Strided; the last stride must be 1.
  RATPLUS_HD constexpr view(T* data, extents<Rank> shape, extents<Rank> stride)
      : data_(data), shape_(shape), stride_(stride) {}

  // A template, because nvcc warns of a conversion to itself in view<const T>.
  template <class U>
  requires(std::is_same_v<U, T> && !std::is_const_v<T>) RATPLUS_HD constexpr operator view<const U, Rank>() const {
    return {data_, shape_, stride_};
  }

  RATPLUS_HD constexpr T* data() const { return data_; }
  RATPLUS_HD constexpr index_t extent(int dim) const { return shape_[dim]; }
  RATPLUS_HD constexpr index_t stride(int dim) const { return stride_[dim]; }
  RATPLUS_HD constexpr const extents<Rank>& shape() const { return shape_; }
  RATPLUS_HD constexpr index_t size() const { return shape_.product(); }

  /// False for a view that was default-constructed: the way an optional argument says "not given".
  RATPLUS_HD constexpr explicit operator bool() const { return data_ != nullptr; }

  template <class... I>
  requires(sizeof...(I) == Rank) RATPLUS_HD constexpr T& operator()(I... i) const { return data_[offset(i...)]; }

  /// Pointer to the first channel of a row: all indices but the last.
  template <class... I>
  requires(sizeof...(I) == Rank - 1) RATPLUS_HD constexpr T* row(I... i) const { return data_ + offset(i...); }

  /// Elements [begin, end) of dimension `dim`.
  RATPLUS_HD constexpr view slice(int dim, index_t begin, index_t end) const {
    view v = *this;
    v.data_ += begin * stride_[dim];
    v.shape_[dim] = end - begin;
    return v;
  }

  /// Exchanges two dimensions; neither may be the last unless its extent is 1.
  RATPLUS_HD constexpr view swap(int a, int b) const {
    view v = *this;
    v.shape_[a] = shape_[b];
    v.shape_[b] = shape_[a];
    v.stride_[a] = stride_[b];
    v.stride_[b] = stride_[a];
    return v;
  }

  /// (…, C) → (…, parts, C / parts): a row's channels as heads.
  RATPLUS_HD constexpr view<T, Rank + 1> split_last(index_t parts) const {
    extents<Rank + 1> shape, stride;
    for (int i = 0; i < Rank - 1; ++i) {
      shape[i] = shape_[i];
      stride[i] = stride_[i];
    }
    shape[Rank - 1] = parts;
    shape[Rank] = shape_[Rank - 1] / parts;
    stride[Rank - 1] = shape[Rank];
    stride[Rank] = 1;
    return {data_, shape, stride};
  }

  /// (N, …) → (outer, N / outer, …): rows as batch and time.
  RATPLUS_HD constexpr view<T, Rank + 1> split_first(index_t outer) const {
    extents<Rank + 1> shape, stride;
    shape[0] = outer;
    shape[1] = outer > 0 ? shape_[0] / outer : 0;
    stride[0] = shape[1] * stride_[0];
    stride[1] = stride_[0];
    for (int i = 1; i < Rank; ++i) {
      shape[i + 1] = shape_[i];
      stride[i + 1] = stride_[i];
    }
    return {data_, shape, stride};
  }

  /// The element `i` of the first dimension, one rank lower.
  RATPLUS_HD constexpr view<T, Rank - 1> operator[](index_t i) const requires(Rank > 1) {
    extents<Rank - 1> shape, stride;
    for (int d = 1; d < Rank; ++d) {
      shape[d - 1] = shape_[d];
      stride[d - 1] = stride_[d];
    }
    return {data_ + i * stride_[0], shape, stride};
  }

  RATPLUS_HD constexpr T& operator[](index_t i) const requires(Rank == 1) { return data_[i * stride_[0]]; }

  /// Rows follow each other without gaps.
  RATPLUS_HD constexpr bool contiguous() const {
    index_t expected = 1;
    for (int i = Rank - 1; i >= 0; --i) {
      if (shape_[i] != 1 && stride_[i] != expected) return false;
      expected *= shape_[i];
    }
    return true;
  }

 private:
  template <class... I>
  RATPLUS_HD constexpr index_t offset(I... i) const {
    const index_t at[] = {static_cast<index_t>(i)..., 0};
    index_t sum = 0;
    for (int d = 0; d < static_cast<int>(sizeof...(I)); ++d) sum += at[d] * stride_[d];
    return sum;
  }

  T* data_ = nullptr;
  extents<Rank> shape_ = {};
  extents<Rank> stride_ = {};
};

/// A contiguous view over `data`: `as_view(p, B, T, C)`.
template <class T, class... N>
RATPLUS_HD constexpr view<T, static_cast<int>(sizeof...(N))> as_view(T* data, N... shape) {
  return {data, extents<static_cast<int>(sizeof...(N))>{{static_cast<index_t>(shape)...}}};
}

}  // namespace ratplus
