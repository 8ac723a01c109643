#pragma once
// Greedy choice is a reduction. Sampling sorts each row's logits (stably, so that equal ones keep the order of their
// ids), then one block walks the cumulative probabilities in double: the same candidates, in the same order, as on the
// host.

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/sample.hpp"

namespace ratplus::cuda {

namespace detail {

inline constexpr int sample_threads = 512;

struct candidate {
  float logit;
  token_t id;
};

struct more_probable {
  __device__ candidate operator()(const candidate& a, const candidate& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id) ? a : b;
  }
};

template <class T>
__global__ void __launch_bounds__(sample_threads) greedy_kernel(sample_args<T> p) {
  const index_t b = blockIdx.x, V = p.logits.extent(1);
  const T* z = p.logits.row(b);
  candidate best{-__int_as_float(0x7f800000), static_cast<token_t>(V - 1)};
  for (index_t i = threadIdx.x; i < V; i += sample_threads)
    best = more_probable{}(candidate{to_float(z[i]), static_cast<token_t>(i)}, best);
  using reduce = cub::BlockReduce<candidate, sample_threads>;
  __shared__ typename reduce::TempStorage storage;
  best = reduce(storage).Reduce(best, more_probable{});
  if (threadIdx.x == 0) p.token[b] = best.id;
}

/// Logits as floats and their ids, rows after one another, and the rows' beginnings.
template <class T>
struct sortable_rows {
  view<const T, 2> logits;
  float* keys;
  token_t *ids, *begins;

  template <int>
  __device__ void at(index_t row, index_t column) const {
    const index_t V = logits.extent(1);
    keys[row * V + column] = to_float(logits(row, column));
    ids[row * V + column] = static_cast<token_t>(column);
    if (column == 0) begins[row] = static_cast<token_t>(row * V);
    if (column == V - 1) begins[row + 1] = static_cast<token_t>((row + 1) * V);
  }
};

/// First i < count at which the sum of weights 0 … i passes the target, and that sum; count and the whole sum when none
/// does. `reached`: the target itself counts as passed.
struct crossing {
  index_t at;
  double sum;
};
template <class Weight>
__device__ crossing find_crossing(index_t count, double target, bool reached, const Weight& weight) {
  using scan = cub::BlockScan<double, sample_threads>;
  __shared__ typename scan::TempStorage storage;
  __shared__ index_t found;
  __shared__ double found_sum;
  double before = 0;
  for (index_t begin = 0; begin < count; begin += sample_threads) {
    const index_t i = begin + threadIdx.x;
    if (threadIdx.x == 0) found = count;
    double sum = 0, total = 0;
    scan(storage).InclusiveSum(i < count ? weight(i) : 0.0, sum, total);
    sum += before;
    before += total;
    __syncthreads();
    const bool passed = i < count && (reached ? sum >= target : sum > target);
    // Sums increase, so the passed are the last threads: the first of them is the one whose predecessor is not.
    if (passed) atomicMin(reinterpret_cast<unsigned long long*>(&found), static_cast<unsigned long long>(i));
    __syncthreads();
    if (found == i) found_sum = sum;
    __syncthreads();
    if (found < count) return {found, found_sum};
    __syncthreads();
  }
  return {count, before};
}

__device__ inline double never() { return __longlong_as_double(0x7ff0000000000000ll); }

template <class = void>
__global__ void __launch_bounds__(sample_threads)
    sample_kernel(const float* sorted, const token_t* ids, index_t V, sampling how, view<const token_t, 1> position,
                  view<token_t, 1> token) {
  const index_t b = blockIdx.x;
  const float* z = sorted + b * V;
  const auto weight = [&](index_t i) {
    return exp((static_cast<double>(z[i]) - static_cast<double>(z[0])) / how.temperature);
  };
  index_t kept = how.top_k > 0 && how.top_k < V ? how.top_k : V;
  double total = find_crossing(kept, never(), false, weight).sum;
  if (how.top_p < 1) {
    const crossing share = find_crossing(kept, how.top_p * total, true, weight);
    if (share.at < kept) {
      kept = share.at + 1;
      total = share.sum;
    }
  }
  const double target =
      total * uniform(how.seed, static_cast<std::uint64_t>(b), static_cast<std::uint64_t>(position[b]));
  const crossing chosen = find_crossing(kept, target, false, weight);
  if (threadIdx.x == 0) token[b] = ids[b * V + (chosen.at < kept ? chosen.at : kept - 1)];
}

}  // namespace detail

template <class T>
void sample_on(context& ctx, const sample_args<T>& p, const sampling& how) {
  const index_t B = p.logits.extent(0), V = p.logits.extent(1), n = B * V;
  const dim3 grid(static_cast<unsigned>(B)), block(detail::sample_threads);
  if (how.temperature == 0) {
    detail::launch(ctx, "sample", detail::greedy_kernel<T>, grid, block, 0, p);
    return;
  }
  struct pieces {
    float *keys, *sorted;
    token_t *ids, *sorted_ids, *begins;
    char* storage;
  } s{};
  std::size_t sort_bytes = 0;
  const auto sort = [&] {
    detail::check(
        cub::DeviceSegmentedRadixSort::SortPairsDescending(
            s.storage, sort_bytes, static_cast<const float*>(s.keys), s.sorted, static_cast<const token_t*>(s.ids),
            s.sorted_ids, n, static_cast<int>(B), static_cast<const token_t*>(s.begins),
            static_cast<const token_t*>(s.begins) + 1, 0, 32, ctx.stream()),
        "sample: sort");
  };
  sort();
  const auto carve = [&](detail::carver c) {
    s.keys = c.take<float>(n);
    s.sorted = c.take<float>(n);
    s.ids = c.take<token_t>(n);
    s.sorted_ids = c.take<token_t>(n);
    s.begins = c.take<token_t>(B + 1);
    s.storage = c.take<char>(static_cast<index_t>(sort_bytes));
    return c.bytes();
  };
  const std::size_t bytes = carve(detail::carver());
  carve(detail::carver(ctx.scratch(bytes)));
  detail::for_rows<1>(ctx, "sample", B, V, detail::sortable_rows<T>{p.logits, s.keys, s.ids, s.begins});
  sort();
  detail::launch(ctx, "sample", detail::sample_kernel<>, grid, block, 0, static_cast<const float*>(s.sorted),
                 static_cast<const token_t*>(s.sorted_ids), V, how, p.position, p.token);
}

}  // namespace ratplus::cuda
