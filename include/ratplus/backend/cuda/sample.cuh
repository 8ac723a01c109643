#pragma once
// One block chooses for one row, without sorting it. What top-k and top-p keep is everything above a threshold, found
// digit by digit from histograms; the draw then walks what is kept in the order of the ids. Probabilities are integers
// (40 bits of fraction), so that sums do not depend on their order.

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "ratplus/backend/cuda/detail/rows.cuh"
#include "ratplus/ops/sample.hpp"

namespace ratplus::cuda {

namespace detail {

inline constexpr int sample_threads = 1024, sample_warps = sample_threads / 32;

using weight_t = unsigned long long;

/// Logits as unsigned numbers of the same order.
__device__ inline unsigned key_of(float logit) {
  const unsigned bits = __float_as_uint(logit);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float logit_of(unsigned key) { return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key); }

struct candidate {
  unsigned key;
  token_t id;
};
struct more_probable {
  __device__ candidate operator()(const candidate& a, const candidate& b) const {
    return a.key > b.key || (a.key == b.key && a.id < b.id) ? a : b;
  }
};

/// f(i, key) for i = first, first + stride, … below end, with several logits on their way at once.
template <class T, class F>
__device__ void for_each_key(const T* z, int first, int end, int stride, F&& f) {
  constexpr int ahead = 8;
  for (int i0 = first; i0 < end; i0 += ahead * stride) {
    T logit[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      if (i0 + u * stride < end) logit[u] = z[i0 + u * stride];
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      if (i0 + u * stride < end) f(i0 + u * stride, key_of(to_float(logit[u])));
  }
}

/// The most probable token of a row, the lowest id among equals, in every thread.
template <class T>
__device__ candidate most_probable(const T* z, int V) {
  candidate best{0, static_cast<token_t>(V - 1)};
  for_each_key(z, static_cast<int>(threadIdx.x), V, sample_threads, [&](int i, unsigned key) {
    best = more_probable{}(candidate{key, static_cast<token_t>(i)}, best);
  });
  using reduce = cub::BlockReduce<candidate, sample_threads>;
  __shared__ typename reduce::TempStorage storage;
  __shared__ candidate shared;
  best = reduce(storage).Reduce(best, more_probable{});
  if (threadIdx.x == 0) shared = best;
  __syncthreads();
  return shared;
}

/// The greatest key of a row, in every thread.
template <class T>
__device__ unsigned greatest_key(const T* z, int V) {
  __shared__ unsigned of_warp[sample_warps];
  unsigned greatest = 0;
  for_each_key(z, static_cast<int>(threadIdx.x), V, sample_threads,
               [&](int, unsigned key) { greatest = key > greatest ? key : greatest; });
  greatest = __reduce_max_sync(~0u, greatest);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = greatest;
  __syncthreads();
  return __reduce_max_sync(~0u, of_warp[threadIdx.x % 32]);
}

template <class T>
__global__ void __launch_bounds__(sample_threads) greedy_kernel(sample_args<T> p) {
  wait_for_previous();
  const index_t b = blockIdx.x;
  const candidate best = most_probable(p.logits.row(b), static_cast<int>(p.logits.extent(1)));
  if (threadIdx.x == 0) p.token[b] = best.id;
}

/// The tokens that are kept: those with a greater key, and the first `equal` of those with this one.
struct threshold {
  unsigned key = 0;
  weight_t equal = 0;
};

/// The fewest most probable of the tokens within `outer` whose measures add up to `limit`, which lies between 1 and the
/// sum of all. The measure is a function of the key; Sum holds sums of it. Logits crowd into few bins: sums of 32 bits,
/// which are enough for counting, are far quicker there.
template <class Sum, class T, class Measure>
__device__ __noinline__ threshold select(const T* z, int V, const threshold& outer, Sum limit, const Measure& measure) {
  constexpr int digit_bits = 11, bins = 1 << digit_bits;
  static_assert(bins == 2 * sample_threads);
  using scan = cub::BlockScan<Sum, sample_threads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename scan::TempStorage storage;
  __shared__ Sum histogram[bins];
  __shared__ Sum limit_within;
  __shared__ unsigned digit;
  unsigned prefix = 0;
  for (int shift = 21, high = 32; high > 0; high = shift, shift = shift > digit_bits ? shift - digit_bits : 0) {
    const auto bin_of = [&](unsigned key) { return static_cast<int>((key >> shift) & ((1u << (high - shift)) - 1)); };
    const auto within = [&](unsigned key) { return high == 32 || key >> high == prefix >> high; };
    histogram[threadIdx.x] = histogram[threadIdx.x + sample_threads] = 0;
    __syncthreads();
    for_each_key(z, static_cast<int>(threadIdx.x), V, sample_threads, [&](int, unsigned key) {
      if (key > outer.key && within(key)) atomicAdd(&histogram[bin_of(key)], measure(key));
    });
    if (threadIdx.x == 0 && outer.equal > 0 && within(outer.key))
      atomicAdd(&histogram[bin_of(outer.key)], static_cast<Sum>(outer.equal) * measure(outer.key));
    __syncthreads();
    // A thread has two bins, the first threads the highest.
    const int upper = bins - 1 - 2 * static_cast<int>(threadIdx.x);
    const Sum a = histogram[upper], b = histogram[upper - 1];
    Sum before = 0;
    scan(storage).ExclusiveSum(a + b, before);
    if (before < limit && limit <= before + a + b) {
      const bool first = limit <= before + a;
      digit = static_cast<unsigned>(first ? upper : upper - 1);
      limit_within = limit - before - (first ? 0 : a);
    }
    __syncthreads();
    prefix |= digit << shift;
    limit = limit_within;
  }
  return {prefix, (limit + measure(prefix) - 1) / measure(prefix)};
}

/// One warp's share of a row: neighbours.
struct warp_share {
  int begin, end;
  __device__ warp_share(int V) {
    constexpr int round = 32 * sample_warps;
    const int each = (V + round - 1) / round * 32, from = static_cast<int>(threadIdx.x) / 32 * each;
    begin = from < V ? from : V;
    end = from + each < V ? from + each : V;
  }
};

template <class X>
__device__ X warp_total(X x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

/// Weights of the tokens above a threshold and numbers of those at it, of each warp's share.
struct share_sums {
  weight_t above[sample_warps], at[sample_warps];

  template <class T, class Weight>
  __device__ void fill(const T* z, int V, unsigned key, const Weight& weight) {
    const warp_share share(V);
    weight_t sum = 0, equal = 0;
    for_each_key(z, share.begin + static_cast<int>(threadIdx.x) % 32, share.end, 32, [&](int, unsigned k) {
      if (k > key) sum += weight(k);
      equal += k == key;
    });
    sum = warp_total(sum);
    equal = warp_total(equal);
    __syncthreads();  // whoever read the sums before is done
    if (threadIdx.x % 32 == 0) {
      above[threadIdx.x / 32] = sum;
      at[threadIdx.x / 32] = equal;
    }
    __syncthreads();
  }
  /// Of the whole row, `equal` tokens at the threshold.
  __device__ weight_t total(weight_t equal, weight_t weight_at) const {
    weight_t sum = equal * weight_at;
    for (const weight_t x : above) sum += x;
    return sum;
  }
};

/// e^((z − greatest) / temperature), 1 in 40 bits. Not inlined: a step's kernels run once and wait for every
/// instruction of theirs to be fetched.
struct probability {
  double greatest, temperature;

  __device__ __noinline__ weight_t operator()(unsigned key) const {
    const double share = exp((static_cast<double>(logit_of(key)) - greatest) / temperature);
    return static_cast<weight_t>(__double2ll_rn(share * 0x1p40));
  }
};

template <class T>
__global__ void __launch_bounds__(sample_threads) sample_kernel(sample_args<T> p, sampling how) {
  wait_for_previous();
  __shared__ share_sums sums;
  const index_t b = blockIdx.x;
  const auto V = static_cast<int>(p.logits.extent(1));
  const T* z = p.logits.row(b);
  const probability weight{static_cast<double>(logit_of(greatest_key(z, V))), how.temperature};
  threshold kept;
  if (how.top_k > 0 && how.top_k < V)
    kept = select(z, V, kept, static_cast<unsigned>(how.top_k), [](unsigned) { return 1u; });
  sums.fill(z, V, kept.key, weight);
  if (how.top_p < 1) {
    const weight_t total = sums.total(kept.equal, weight(kept.key));
    const auto share = static_cast<weight_t>(ceil(how.top_p * static_cast<double>(total)));
    kept = select(z, V, kept, share < 1 ? weight_t{1} : share < total ? share : total, weight);
    sums.fill(z, V, kept.key, weight);
  }

  // The warp in whose share the target lies walks it.
  const weight_t at_threshold = kept.equal > 0 ? weight(kept.key) : 0;
  const double u = uniform(how.seed, static_cast<std::uint64_t>(b), static_cast<std::uint64_t>(p.position[b]));
  const weight_t total = sums.total(kept.equal, at_threshold);
  const auto drawn = static_cast<weight_t>(u * static_cast<double>(total)), target = drawn < total ? drawn : total - 1;
  weight_t before = 0, equal = 0, here = 0;
  for (unsigned w = 0; w <= threadIdx.x / 32; ++w) {
    before += here;
    const weight_t left = kept.equal - equal, mine = sums.at[w] < left ? sums.at[w] : left;
    here = sums.above[w] + mine * at_threshold;
    if (w < threadIdx.x / 32) equal += mine;
  }
  if (target < before || target >= before + here) return;
  const warp_share share(V);
  const unsigned lane_id = threadIdx.x % 32;
  for (int i0 = share.begin; i0 < share.end; i0 += 32) {
    const int i = i0 + static_cast<int>(lane_id);
    const unsigned key = i < share.end ? key_of(to_float(z[i])) : 0;
    const unsigned equals = __ballot_sync(~0u, i < share.end && key == kept.key);
    const weight_t rank = equal + static_cast<weight_t>(__popc(equals & ((1u << lane_id) - 1)));
    const bool keep = i < share.end && (key > kept.key || (key == kept.key && rank < kept.equal));
    equal += static_cast<weight_t>(__popc(equals));
    if (!__any_sync(~0u, keep)) continue;
    weight_t sum = keep ? weight(key) : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const weight_t other = __shfl_up_sync(~0u, sum, offset);
      if (lane_id >= static_cast<unsigned>(offset)) sum += other;
    }
    const unsigned passed = __ballot_sync(~0u, before + sum > target);
    if (passed != 0) {
      if (lane_id == static_cast<unsigned>(__ffs(static_cast<int>(passed)) - 1)) p.token[b] = static_cast<token_t>(i);
      return;
    }
    before += __shfl_sync(~0u, sum, 31);
  }
}

}  // namespace detail

template <class T>
void sample_on(context& ctx, const sample_args<T>& p, const sampling& how) {
  const dim3 grid(static_cast<unsigned>(p.logits.extent(0))), block(detail::sample_threads);
  if (how.temperature == 0)
    detail::launch_overlapped(ctx, "sample", detail::greedy_kernel<T>, grid, block, 0, p);
  else
    detail::launch_overlapped(ctx, "sample", detail::sample_kernel<T>, grid, block, 0, p, how);
}

}  // namespace ratplus::cuda
