#pragma once
// C = A · Bᵀ with at most 8 rows of A, bfloat16: reading B is all that takes time. A block takes 16 rows of B after
// another, straight from global memory into the registers of its warps, which share out the columns; the next 64 KB are
// on their way while the last are multiplied, and where B is a parameter the first are asked for before the kernel's
// other inputs are there. A and C are behind two policies, so that a layer's norm and activation need no kernels of
// their own.
//
// A lane holds 8 neighbouring columns of a row of B, and of a row of A, and gives them to two matrix instructions of 16
// columns. These expect other columns in that lane, but the same ones of both factors, and a sum has no order.

#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/detail/vector.cuh"

namespace ratplus::cuda::detail::few_rows {

inline constexpr int most_rows = 8, tile = 16;  // of A; of B at once
inline constexpr int warps = 16, threads = 32 * warps;
inline constexpr int block = 32, blocks = 4;  // columns of B that a warp reads at once; how many times in a group
inline constexpr int sums_bytes = 2 * warps * tile * most_rows * static_cast<int>(sizeof(float));

/// Rows of A lie this many bytes apart in shared memory: of two neighbours no chunks meet in a bank.
[[nodiscard]] RATPLUS_HD constexpr int pitch(int K) { return 2 * K + (2 * K % 128 == 0 ? 64 : 0); }

struct shape {
  int M, N, K;
  bool early;  // B may be read before the kernel before this one has ended

  [[nodiscard]] RATPLUS_HD int shared_bytes() const { return sums_bytes + M * pitch(K); }
};

/// C (16 × 8) += A (16 × 16) · B (16 × 8), fragments.
__device__ inline void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// What a warp reads of 16 rows of B at once: a lane's 8 columns of a row and of the row 8 below.
struct group {
  uint4 upper[blocks], lower[blocks];

  __device__ void read(const view<const bfloat16, 2>& b, const shape& s, int n0, int k0) {
    const int lane_id = threadIdx.x % 32, warp = threadIdx.x / 32, last = s.N - 1;
    const int first_row = n0 + lane_id / 4, second_row = first_row + 8;
    const bfloat16 *first = b.row(first_row < last ? first_row : last),
                   *second = b.row(second_row < last ? second_row : last);
#pragma unroll
    for (int u = 0; u < blocks; ++u) {
      const int k = k0 + (u * warps + warp) * block + lane_id % 4 * 8;
      upper[u] = lower[u] = uint4{};
      if (k < s.K) {
        read(upper[u], first + k);
        read(lower[u], second + k);
      }
    }
  }

  /// c += these rows · A's.
  __device__ void multiply_with(const char* a_row, const shape& s, int k0, float (&c)[4]) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int u = 0; u < blocks; ++u) {
      const int k = k0 + (u * warps + warp) * block;
      if (k >= s.K) break;
      const uint4 a = *reinterpret_cast<const uint4*>(a_row + 2 * k);
      multiply(c, upper[u].x, lower[u].x, upper[u].y, lower[u].y, a.x, a.y);
      multiply(c, upper[u].z, lower[u].z, upper[u].w, lower[u].w, a.z, a.w);
    }
  }

 private:
  // Volatile: asked for here and not where it is needed.
  static __device__ void read(uint4& x, const bfloat16* p) {
    std::uint64_t once;  // what is read again shall stay in the second-level cache
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(__cvta_generic_to_global(p)), "l"(once));
  }
};

/// In: in.fill(rows, s) writes A to shared memory, rows pitch(K) bytes apart. Out: out.before(m, n) is what element
/// (m, n) starts from, out.write(m, n, x) its end.
template <class In, class Out>
__global__ void __launch_bounds__(threads, 1) kernel(In in, Out out, view<const bfloat16, 2> b, shape s) {
  extern __shared__ __align__(128) char memory[];
  char* const a_rows = memory + sums_bytes;
  constexpr int span = warps * block * blocks;  // columns of a group of every warp
  const int step = static_cast<int>(gridDim.x) * tile, lane_id = threadIdx.x % 32, warp = threadIdx.x / 32;
  int n0 = static_cast<int>(blockIdx.x) * tile;
  group now, next;
  if (s.early) now.read(b, s, n0, 0);
  wait_for_previous();
  if (!s.early) now.read(b, s, n0, 0);
  in.fill(a_rows, s);
  __syncthreads();

  const int m = static_cast<int>(threadIdx.x) / tile, n = static_cast<int>(threadIdx.x) % tile;  // to finish
  const int row = lane_id / 4 < s.M ? lane_id / 4 : s.M - 1;
  const char* const a_row = a_rows + row * pitch(s.K) + lane_id % 4 * 16;
  auto* part = reinterpret_cast<float*>(memory);  // (warps, tile, most_rows), twice
  for (bool odd = false; n0 < s.N; odd = !odd) {
    const bool mine = m < s.M && n0 + n < s.N;
    float x = mine ? out.before(m, n0 + n) : 0.0f;
    float c[4] = {};
    for (int k = 0; k < s.K; k += span) {
      const bool within = k + span < s.K;
      if (within || n0 + step < s.N) next.read(b, s, within ? n0 : n0 + step, within ? k + span : 0);
      now.multiply_with(a_row, s, k, c);
      now = next;
    }
    float* const sums = part + (odd ? warps * tile * most_rows : 0);
    float* const to = sums + (warp * tile + lane_id / 4) * most_rows + lane_id % 4 * 2;
    to[0] = c[0], to[1] = c[1], to[8 * most_rows] = c[2], to[8 * most_rows + 1] = c[3];
    __syncthreads();
    if (mine) {
#pragma unroll
      for (int w = 0; w < warps; ++w) x += sums[(w * tile + n) * most_rows + m];
      out.write(m, n0 + n, x);
    }
    n0 += step;
  }
}

/// A as it is.
struct plain_rows {
  view<const bfloat16, 2> a;

  __device__ void fill(char* rows, const shape& s) const {
    for (int m = 0; m < s.M; ++m)
      for (int k = 8 * static_cast<int>(threadIdx.x); k < s.K; k += 8 * threads)
        *reinterpret_cast<uint4*>(rows + m * pitch(s.K) + 2 * k) = *reinterpret_cast<const uint4*>(a.row(m) + k);
  }
};

/// C, or C + addend.
template <class TC>
struct sums_out {
  view<TC, 2> c;
  view<const TC, 2> addend;

  __device__ float before(int m, int n) const { return addend ? to_float(addend(m, n)) : 0.0f; }
  __device__ void write(int m, int n, float x) const { c(m, n) = from_float<TC>(x); }

  [[nodiscard]] bool in_pairs() const { return aligned(c, 2) && (!addend || aligned(addend, 2)); }
  __device__ float2 pair_before(int m, int n) const {
    float x[2] = {};
    if (addend) load(addend.row(m) + n, x);
    return {x[0], x[1]};
  }
  __device__ void write_pair(int m, int n, float2 x) const {
    const float pair[2] = {x.x, x.y};
    store(c.row(m) + n, pair);
  }
};

/// Queues the product; false where this kernel does not serve it: more rows, other extents or alignment.
template <class In, class Out>
[[nodiscard]] bool run(context& ctx, const In& in, const Out& out, const view<const bfloat16, 2>& b, index_t M,
                       bool early) {
  const index_t N = b.extent(0), K = b.extent(1);
  if (M > most_rows || K == 0 || K % block != 0 || K > 1 << 20 || N > INT32_MAX / 2 || !aligned(b, 8)) return false;
  const shape s{static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), early};
  if (static_cast<std::size_t>(s.shared_bytes()) > ctx.properties().sharedMemPerBlockOptin) return false;
  const unsigned tiles = grid_for(N, tile, ctx.multiprocessors());
  launch_overlapped(ctx, "matmul", kernel<In, Out>, dim3(tiles), dim3(threads),
                    static_cast<std::size_t>(s.shared_bytes()), in, out, b, s);
  return true;
}

}  // namespace ratplus::cuda::detail::few_rows
