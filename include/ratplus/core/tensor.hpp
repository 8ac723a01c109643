#pragma once
// tensor<T, Rank, Space>: contiguous memory that is owned, moved and freed. Space says where it lies (host memory here,
// a CUDA device's in cuda.cuh) and is part of the type, so that a host pointer cannot reach a device kernel by mistake.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ratplus/core/error.hpp"
#include "ratplus/core/view.hpp"

namespace ratplus {

/// A memory space hands out and takes back bytes; `allocate` throws when there are none left.
///
/// Large tensors ask for huge pages, where the system has them to give: rows of a head lie thousands of bytes apart,
/// and with pages of 4 KiB finding the page would take longer than reading the row.
struct host_space {
  static constexpr std::size_t alignment = 64;

  static void* allocate(std::size_t bytes) {
    if (bytes < large) return ::operator new (bytes, std::align_val_t{alignment});
    char* const pages = static_cast<char*>(::operator new (bytes + most_offset, std::align_val_t{huge_page}));
#if defined(__linux__)
    (void)::madvise(pages, bytes + most_offset, MADV_HUGEPAGE);
#endif
    // Tensors that all begin at the beginning of a page would meet in the same sets of the caches.
    return pages + reinterpret_cast<std::uintptr_t>(pages) / huge_page % offsets * (most_offset / offsets);
  }
  static void deallocate(void* data, std::size_t bytes) noexcept {
    if (bytes < large) return ::operator delete (data, std::align_val_t{alignment});
    const auto into_page = reinterpret_cast<std::uintptr_t>(data) % huge_page;
    ::operator delete (static_cast<char*>(data) - into_page, std::align_val_t{huge_page});
  }

 private:
  static constexpr std::size_t huge_page = std::size_t{2} << 20, large = 8 * huge_page, offsets = 16,
                               most_offset = offsets * 17 * alignment;
};

template <class T, int Rank, class Space = host_space>
class tensor {
 public:
  using space = Space;

  tensor() = default;

  /// Uninitialised elements of the given shape; throws shape_error when an extent is negative.
  explicit tensor(const extents<Rank>& shape) : shape_(shape) {
    for (int i = 0; i < Rank; ++i)
      if (shape[i] < 0) throw shape_error(message("tensor: extent ", i, " is ", shape[i]));
    if (size() > 0) data_ = static_cast<T*>(Space::allocate(bytes()));
  }

  template <std::convertible_to<index_t>... N>
  requires(sizeof...(N) == Rank) explicit tensor(N... shape)
      : tensor(extents<Rank>{{static_cast<index_t>(shape)...}}) {}

  tensor(tensor&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), shape_(std::exchange(other.shape_, {})) {}

  tensor& operator=(tensor&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(shape_, other.shape_);
    return *this;
  }

  ~tensor() {
    if (data_ != nullptr) Space::deallocate(data_, bytes());
  }

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] index_t extent(int dim) const { return shape_[dim]; }
  [[nodiscard]] const extents<Rank>& shape() const { return shape_; }
  [[nodiscard]] index_t size() const { return shape_.product(); }
  [[nodiscard]] std::size_t bytes() const { return static_cast<std::size_t>(size()) * sizeof(T); }

  // A const tensor gives read-only views.
  operator ratplus::view<T, Rank>() { return {data_, shape_}; }
  operator ratplus::view<const T, Rank>() const { return {data_, shape_}; }
  [[nodiscard]] ratplus::view<T, Rank> view() { return *this; }
  [[nodiscard]] ratplus::view<const T, Rank> view() const { return *this; }

  /// The same elements under another shape: `t.as(B, T, H * d)`. Sizes must agree.
  template <class... N>
  [[nodiscard]] auto as(N... shape) {
    return reshaped<T>(shape...);
  }
  template <class... N>
  [[nodiscard]] auto as(N... shape) const {
    return reshaped<const T>(shape...);
  }

 private:
  template <class U, class... N>
  auto reshaped(N... shape) const {
    auto v = as_view<U>(data_, shape...);
    if (v.size() != size()) throw shape_error(message("tensor: ", size(), " elements seen as ", v.size()));
    return v;
  }

  T* data_ = nullptr;
  extents<Rank> shape_ = {};
};

template <class T, class Space = host_space, class... N>
[[nodiscard]] tensor<T, static_cast<int>(sizeof...(N)), Space> make_tensor(N... shape) {
  constexpr int rank = static_cast<int>(sizeof...(N));
  return tensor<T, rank, Space>(extents<rank>{{static_cast<index_t>(shape)...}});
}

}  // namespace ratplus
