#pragma once
// Hopper's own instructions (compute capability 9.0a), one small function each: the bulk tensor copy engine (TMA) that
// moves tiles between global and shared memory, the mbarriers it completes on, and wgmma, the matrix product that a
// group of 128 threads issues asynchronously with its operands in shared memory or registers.
//
// Tiles lie in shared memory as panels of 64 bfloat16 channels: row i of a panel is 128 bytes, whose 16-byte chunks
// are permuted by i % 8 (the 128-byte swizzle), so that neither rows nor columns of chunks collide in a bank. A tile of
// d channels is d / 64 panels after one another; panels start at multiples of 1024 bytes.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ratplus/core/error.hpp"
#include "ratplus/core/index.hpp"

namespace ratplus::cuda::hopper {

inline constexpr int panel_channels = 64;
inline constexpr int row_bytes = 128;
inline constexpr int group_threads = 128;

// ---- Host: tensor maps ------------------------------------------------------------------------------------------

/// A tile loader's description of rows origin, origin + step, … of a (B, H, T, d) tensor of bfloat16: coordinates
/// (channel, row, head, sequence), boxes of 64 channels × box_rows rows. Rows and channels out of range read as zero
/// and are not written.
struct rows_of_heads {
  const void* data;
  index_t d, T, H, B;           // extents
  index_t row, head, sequence;  // strides in elements
  index_t origin = 0, step = 1;
};

[[nodiscard]] inline CUtensorMap tensor_map(const rows_of_heads& x, int box_rows) {
  using encode_t = decltype(&cuTensorMapEncodeTiled);
  static const encode_t encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw error("cuda: the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
    return reinterpret_cast<encode_t>(f);
  }();
  const index_t origin = x.origin < x.T ? x.origin : x.T - 1, rows = (x.T - origin + x.step - 1) / x.step;
  // The stride of an extent of 1 is never used but must be a multiple of 16 bytes.
  const auto bytes = [](index_t stride, index_t extent) {
    return static_cast<cuuint64_t>(extent == 1 ? 16 : 2 * stride);
  };
  const cuuint64_t shape[] = {static_cast<cuuint64_t>(x.d), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(x.H),
                              static_cast<cuuint64_t>(x.B)};
  const cuuint64_t stride[] = {bytes(x.row * x.step, rows), bytes(x.head, x.H), bytes(x.sequence, x.B)};
  const cuuint32_t box[] = {panel_channels, static_cast<cuuint32_t>(box_rows), 1, 1}, one[] = {1, 1, 1, 1};
  auto* first = const_cast<char*>(static_cast<const char*>(x.data)) + 2 * origin * x.row;
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, first, shape, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw error(message("cuda: no tensor map for ", x.B, "×", x.H, "×", x.T, "×", x.d, " with strides ", x.sequence,
                        ", ", x.head, ", ", x.row, " (CUresult ", static_cast<int>(result), ")"));
  return map;
}

/// Whether the copy engine can address such a tensor: 16-byte base and strides.
[[nodiscard]] inline bool addressable(const rows_of_heads& x) {
  const auto aligned = [](index_t stride, index_t extent) { return extent == 1 || stride % 8 == 0; };
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.d % 8 == 0 && aligned(x.row, x.T) &&
         aligned(x.head, x.H) && aligned(x.sequence, x.B);
}

/// Whether the Hopper kernels were compiled into this program: their barriers are static shared memory, and a build for
/// another architecture leaves their bodies empty.
template <class Kernel>
[[nodiscard]] bool compiled(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.sharedSizeBytes > 0;
}

// ---- Device: barriers and copies --------------------------------------------------------------------------------

[[nodiscard]] __device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// The block's dynamic shared memory from its first multiple of 1024 bytes, where panels may start.
[[nodiscard]] __device__ inline char* shared_tiles() {
  extern __shared__ char memory[];
  return memory + (1024 - shared_address(memory) % 1024) % 1024;
}

/// Completes a phase when `count` threads have arrived and the bytes they announced have landed.
struct barrier {
  std::uint64_t word;

  __device__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  /// The same for `count` threads.
  __device__ void arrive(int count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
  }
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  /// Announces bytes before the arrival.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  /// Whether the phase of the given parity has completed.
  [[nodiscard]] __device__ bool done(int parity) {
    std::uint32_t yes;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(yes)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return yes != 0;
  }
  /// Returns when the phase of the given parity has completed. Threads that wait may sleep this many nanoseconds before
  /// they look again: looking all the time takes turns from those who compute.
  __device__ void wait(int parity) {
    constexpr int sleep = 1000000;
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(shared_address(this)),
        "r"(parity), "r"(sleep)
        : "memory");
  }
};

/// After all inits, before any other thread or the copy engine uses the barriers; a block barrier must follow.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// Position in a ring of buffers, and the parity of the barrier phase that belongs to this lap; it advances by no more
/// than a lap.
template <int Stages>
struct ring_place {
  int stage = 0, parity = 0;
  __device__ void advance(int by = 1) {
    stage += by;
    if (stage >= Stages) {
      stage -= Stages;
      parity ^= 1;
    }
  }
};

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(&map)) : "memory");
}

/// One panel: global → shared memory, its bytes counted by `done`.
__device__ inline void load_panel(void* to, const CUtensorMap& map, barrier& done, int channel, int row, int head,
                                  int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(&done)), "r"(channel), "r"(row), "r"(head),
      "r"(sequence)
      : "memory");
}

/// A policy of the second-level cache for what is read once: it does not push out what is read again.
[[nodiscard]] __device__ inline std::uint64_t read_once() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// load_panel under such a policy.
__device__ inline void load_panel(void* to, const CUtensorMap& map, barrier& done, int channel, int row, int head,
                                  int sequence, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(&done)), "r"(channel), "r"(row), "r"(head),
      "r"(sequence), "l"(policy)
      : "memory");
}

/// `bytes` neighbours, both ends and the count at multiples of 16: global → shared memory.
__device__ inline void load_bytes(void* to, const void* from, int bytes, barrier& done) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&done))
               : "memory");
}

/// load_bytes under a policy of the second-level cache.
__device__ inline void load_bytes(void* to, const void* from, int bytes, barrier& done, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&done)), "l"(policy)
      : "memory");
}

/// One panel: shared memory → global.
__device__ inline void store_panel(const CUtensorMap& map, const void* from, int channel, int row, int head,
                                   int sequence) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<std::uint64_t>(&map)),
               "r"(shared_address(from)), "r"(channel), "r"(row), "r"(head), "r"(sequence)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Returns when this thread's committed stores have read their shared memory.
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
/// Returns when this thread's committed stores are in global memory.
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/// Makes this thread's ordinary writes to shared memory visible to the copy engine and to wgmma.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Adds one to a counter in global memory. Whoever has seen it there sees what this thread has written, or has seen of
/// others.
__device__ inline void release_increment(unsigned* counter) {
  asm volatile("fence.proxy.async;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
               : "memory");
}
/// A counter that others add to.
[[nodiscard]] __device__ inline unsigned load_counter(const unsigned* counter) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return x;
}
/// After counters were seen to be where they should: then this thread, and the copy engine for it, may read what was
/// counted.
__device__ inline void acquire_counted() { asm volatile("fence.acq_rel.gpu;\nfence.proxy.async;" ::: "memory"); }

/// x, unknown to the compiler: what is computed from it is computed where it is used, and not once before a long loop
/// to be kept in registers that the loop then lacks.
[[nodiscard]] __device__ inline int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// True in one lane of a warp whose lanes are all present. The compiler then knows that one thread issues what follows,
/// and need not find out whose operands a copy takes.
[[nodiscard]] __device__ inline bool elected() {
  std::uint32_t yes;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(yes));
  return yes != 0;
}

/// A barrier among `threads` threads of the block; ids 1…15, 0 is __syncthreads.
__device__ inline void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Counts towards such a barrier without waiting for it.
__device__ inline void arrive_threads(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Moves registers between the warp groups of a block: copying warps need few, computing warps many.
template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- Device: wgmma ----------------------------------------------------------------------------------------------
//
// Fragments. Thread `lane` of warp w (of 4) holds of a 64 × N accumulator the elements
//     d[4j + 2h + e]  =  row 16w + lane/4 + 8h,  column 8j + 2(lane % 4) + e            (h, e in {0, 1})
// and of a 64 × 16 A operand, packed in pairs, the same with j in {0, 1}: an accumulator, rounded, is the next
// product's A.

/// Describes an operand in shared memory. `rows_to_rows`: bytes between groups of 8 rows (1024 within a panel);
/// `panel_to_panel`: bytes between panels, used only where N or M runs across panels.
[[nodiscard]] __device__ inline std::uint64_t operand(const void* p, int panel_to_panel = 16) {
  constexpr std::uint64_t swizzle_128 = std::uint64_t{1} << 62;
  const std::uint64_t address = (shared_address(p) & 0x3ffff) >> 4;
  return address | static_cast<std::uint64_t>(panel_to_panel >> 4) << 16 | std::uint64_t{1024 >> 4} << 32 | swizzle_128;
}
/// The same operand `bytes` further on: its address is in the lower word and never carries.
[[nodiscard]] __device__ inline std::uint64_t advanced(std::uint64_t operand, int bytes) {
  const std::uint32_t low = static_cast<std::uint32_t>(operand) + static_cast<std::uint32_t>(bytes >> 4);
  return operand >> 32 << 32 | low;
}

/// The same with this distance from panel to panel instead of operand's default.
[[nodiscard]] __device__ inline std::uint64_t across_panels(std::uint64_t operand, int panel_to_panel) {
  return advanced(operand, (panel_to_panel - 16) << 16);
}

/// An operand that all lanes of a warp hold, made known to the compiler as one value: what is computed from it then
/// takes one instruction in registers of the warp, and not four in those of its threads.
[[nodiscard]] __device__ inline std::uint64_t value_of_warp(std::uint64_t operand) {
  return operand >> 32 << 32 | __shfl_sync(~0u, static_cast<std::uint32_t>(operand), 0);
}
[[nodiscard]] __device__ inline std::uint64_t operand_of_warp(const void* p, int panel_to_panel = 16) {
  return value_of_warp(operand(p, panel_to_panel));
}

/// Orders register accesses before the wgmma that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Returns when at most `Pending` committed groups are unfinished.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Keeps the compiler from moving accesses of an accumulator across an asynchronous product.
template <int N>
__device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define RATPLUS_F8(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RATPLUS_F32(d, i) RATPLUS_F8(d, i), RATPLUS_F8(d, i + 8), RATPLUS_F8(d, i + 16), RATPLUS_F8(d, i + 24)
#define RATPLUS_R32                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RATPLUS_R40 RATPLUS_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RATPLUS_R64                                                                                             \
  RATPLUS_R32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// d (64 × 2·Size) = a b + (accumulate ? d : 0) over 16 channels; a is 64 × 16 and b N × 16, both in shared memory with
/// the summed dimension contiguous.
template <int Size>
__device__ inline void product(float (&d)[Size], std::uint64_t a, std::uint64_t b, bool accumulate) {
  static_assert(Size == 32 || Size == 40 || Size == 64);
  if constexpr (Size == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RATPLUS_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : RATPLUS_F32(d, 0), RATPLUS_F32(d, 32)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  else if constexpr (Size == 40)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" RATPLUS_R40 "}, %40, %41, p, 1, 1, 0, 0;\n}"
        : RATPLUS_F32(d, 0), RATPLUS_F8(d, 32)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RATPLUS_R32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
        : RATPLUS_F32(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

/// The same with a in registers. SumAcrossRows: b is 16 × N, its rows being the summed dimension.
template <bool SumAcrossRows, int Size>
__device__ inline void product(float (&d)[Size], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  static_assert(Size == 32 || Size == 64);
  if constexpr (Size == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RATPLUS_R64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : RATPLUS_F32(d, 0), RATPLUS_F32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(SumAcrossRows)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RATPLUS_R32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : RATPLUS_F32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(static_cast<int>(SumAcrossRows)));
}

#undef RATPLUS_F8
#undef RATPLUS_F32
#undef RATPLUS_R32
#undef RATPLUS_R40
#undef RATPLUS_R64

/// Two floats rounded to bfloat16, `low` in the lower half.
[[nodiscard]] __device__ inline std::uint32_t rounded_pair(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

/// Products of two pairs of bfloat16, rounded.
[[nodiscard]] __device__ inline std::uint32_t product_of_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t word;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

/// `count` ones from bit `first` on, up to bit 31.
[[nodiscard]] __device__ inline std::uint32_t bits_from(int first, int count) {
  std::uint32_t bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(first), "r"(count));
  return bits;
}

/// 2^x, to 2 units in the last place.
[[nodiscard]] __device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x and log2(x), to 1 unit in the last place or nearly.
[[nodiscard]] __device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
[[nodiscard]] __device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Four 8 × 8 blocks of 16-bit elements from fragments to shared memory; lane l gives the address of row l % 8 of block
/// l / 8.
__device__ inline void store_blocks(std::uint32_t row, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                    std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
__device__ inline void store_blocks(void* row, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  store_blocks(shared_address(row), a, b, c, d);
}
/// And back.
__device__ inline void load_blocks(std::uint32_t row, std::uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_blocks(const void* row, std::uint32_t (&a)[4]) { load_blocks(shared_address(row), a); }
/// And back, every block transposed.
__device__ inline void load_blocks_transposed(std::uint32_t row, std::uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}

/// d (16 × 8) += a (16 × 16) b (8 × 16)ᵀ, by one warp; fragments as load_blocks gives them, an accumulator's as above.
__device__ inline void product_of_blocks(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Byte offset, in a tile of panels of `rows` rows, of the 16-byte chunk of row `row` that starts at channel 8 · chunk.
[[nodiscard]] __device__ inline int chunk_offset(int rows, int row, int chunk) {
  return (chunk >> 3) * rows * row_bytes + row * row_bytes + (((chunk & 7) ^ (row & 7)) << 4);
}

/// The addresses at which load_blocks and store_blocks find the 16 × 16 blocks of 16 rows, from row `row` on, of a tile
/// of panels of Rows rows: lane l points at row l % 16, chunk 2 c + l / 16 for block c.
template <int Rows>
class block_rows {
 public:
  __device__ block_rows(const char* tile, int row, unsigned lane) {
    const unsigned i = static_cast<unsigned>(row) + lane % 16;
    first_ = shared_address(tile) + i * row_bytes + ((lane / 16 ^ i % 8) << 4);
  }
  [[nodiscard]] __device__ std::uint32_t operator[](int c) const {
    return (first_ ^ static_cast<unsigned>(c % 4 * 32)) + static_cast<unsigned>(c / 4 * Rows * row_bytes);
  }

 private:
  std::uint32_t first_;
};

}  // namespace ratplus::cuda::hopper
