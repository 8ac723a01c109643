#pragma once
#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/embed.hpp"

namespace ratplus::reference {

template <class T>
void embed_forward_on(context&, view<const token_t, 1> tokens, view<const T, 2> table, view<T, 2> x) {
  for (index_t n = 0; n < x.extent(0); ++n)
    for (index_t i = 0; i < x.extent(1); ++i) x(n, i) = table(tokens[n], i);
}

template <class T>
void embed_backward_on(context&, view<const token_t, 1> tokens, view<const T, 2> dx, view<accumulator_t<T>, 2> dtable) {
  for (index_t n = 0; n < dx.extent(0); ++n)
    for (index_t i = 0; i < dx.extent(1); ++i) dtable(tokens[n], i) += wide(dx(n, i));
}

}  // namespace ratplus::reference
