#pragma once
// Elementwise operations on rows: f.at<V>(row, column) computes V consecutive columns, V as wide as the views'
// alignment allows. Such kernels do nothing but move bytes, so accesses of 16 bytes are all they need.

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"

namespace ratplus::cuda::detail {

inline constexpr int row_threads = 256;

template <int V, class F>
__global__ void __launch_bounds__(row_threads) for_each_element(index_t rows, index_t columns, F f) {
  wait_for_previous();
  const index_t column = (static_cast<index_t>(blockIdx.x) * row_threads + threadIdx.x) * V;
  if (column >= columns) return;
  for (index_t row = blockIdx.y; row < rows; row += gridDim.y) f.template at<V>(row, column);
}

/// f over (rows, columns), V columns at a time when all of `views` allow it.
template <int V, class F, class... Views>
void for_rows(context& ctx, const char* what, index_t rows, index_t columns, const F& f, const Views&... views) {
  const bool wide = columns % V == 0 && (aligned(views, V) && ...);
  const index_t per_row = wide ? columns / V : columns;
  const dim3 grid(static_cast<unsigned>(ceil_div(per_row, row_threads)), grid_for(rows, 1, 65535));
  if (wide)
    launch_overlapped(ctx, what, for_each_element<V, F>, grid, dim3(row_threads), 0, rows, columns, f);
  else
    launch_overlapped(ctx, what, for_each_element<1, F>, grid, dim3(row_threads), 0, rows, columns, f);
}

/// The row with flat index `row` over all dimensions but the last.
template <class T, int R>
__device__ T* flat_row(const view<T, R>& v, index_t row) {
  T* p = v.data();
#pragma unroll
  for (int i = R - 2; i > 0; --i) {
    const index_t next = row / v.extent(i);
    p += (row - next * v.extent(i)) * v.stride(i);
    row = next;
  }
  if constexpr (R > 1) p += row * v.stride(0);
  return p;
}

}  // namespace ratplus::cuda::detail
