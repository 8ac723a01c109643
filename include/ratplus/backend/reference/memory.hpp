#pragma once
#include <cstring>

#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/memory.hpp"

namespace ratplus::reference {

template <class T>
void fill_on(context&, view<T, 1> x, T value) {
  for (index_t i = 0; i < x.extent(0); ++i) x[i] = value;
}

template <class From, class To, int Rank>
void copy_on(context& ctx, view<const From, Rank> x, view<To, Rank> y) {
  for (index_t i = 0; i < x.extent(0); ++i) {
    if constexpr (Rank == 1)
      y[i] = static_cast<To>(static_cast<accumulator_t<To>>(wide(x[i])));  // bfloat16 is made of floats alone
    else
      copy_on(ctx, x[i], y[i]);
  }
}

template <class T>
void upload_on(context&, const T* host, view<T, 1> x) {
  std::memcpy(x.data(), host, static_cast<std::size_t>(x.size()) * sizeof(T));
}

template <class T>
void download_on(context&, view<const T, 1> x, T* host) {
  std::memcpy(host, x.data(), static_cast<std::size_t>(x.size()) * sizeof(T));
}

}  // namespace ratplus::reference
