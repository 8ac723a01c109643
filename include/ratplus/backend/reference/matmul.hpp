#pragma once
#include "ratplus/backend/reference/context.hpp"
#include "ratplus/ops/matmul.hpp"

namespace ratplus::reference {

template <class T, class TC>
void matmul_on(context&, const matmul_args<T, TC>& p) {
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  for (index_t m = 0; m < M; ++m)
    for (index_t n = 0; n < N; ++n) {
      accumulator_t<TC> sum = p.addend ? wide(p.addend(m, n)) : accumulator_t<TC>(0);
      for (index_t k = 0; k < K; ++k)
        sum += static_cast<accumulator_t<TC>>(wide(p.transpose_a ? p.a(k, m) : p.a(m, k)) *
                                              wide(p.transpose_b ? p.b(n, k) : p.b(k, n)));
      p.c(m, n) = static_cast<TC>(sum);
    }
}

}  // namespace ratplus::reference
