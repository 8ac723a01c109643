#pragma once
// The device, its memory and the order of work on it. One context is one stream: operations return when they are
// queued, run in the order they were asked for, and `synchronize()` waits for them. Whoever reads results on the host
// uses `download`, which waits by itself.

#include <cublasLt.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "ratplus/backend/cuda/error.cuh"
#include "ratplus/ops/context.hpp"

namespace ratplus::cuda {

/// Device memory for tensor<T, Rank, cuda::space>, from the current device's stream-ordered pool. Allocation and
/// release are ordered with the work of every context of the device, so a tensor may be destroyed while kernels that
/// use it are still queued. Throws cuda_error with the sizes when memory is spent.
struct space {
  static void* allocate(std::size_t bytes) {
    keep_freed_memory();
    void* data = nullptr;
    const cudaError_t status = cudaMallocAsync(&data, bytes, cudaStreamLegacy);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw cuda_error(message("cuda: out of memory: ", bytes, " bytes asked, ", free, " of ", total,
                               " free on the device; a smaller batch, a shorter piece of the sequence or a sparser "
                               "pattern needs less"));
    }
    detail::check(status, "cuda: allocation");
    return data;
  }

  static void deallocate(void* data, std::size_t) noexcept { cudaFreeAsync(data, cudaStreamLegacy); }

 private:
  /// The pool keeps what is freed instead of giving it back to the driver at every synchronisation.
  static void keep_freed_memory() {
    int device = 0;
    detail::check(cudaGetDevice(&device), "cuda: allocation");
    static thread_local int kept = -1;
    if (kept == device) return;
    cudaMemPool_t pool;
    detail::check(cudaDeviceGetDefaultMemPool(&pool, device), "cuda: memory pool");
    std::uint64_t threshold = ~std::uint64_t{0};
    detail::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold), "cuda: memory pool");
    kept = device;
  }
};

namespace detail {

/// Exists so that the context can ask whether the program has code for the device.
template <class = void>
__global__ void probe() {}

struct cublas_closer {
  void operator()(cublasLtContext* handle) const { cublasLtDestroy(handle); }
};

/// A product's prepared plan (backend/cuda/matmul.cuh).
struct matmul_plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, addend = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};

  matmul_plan() = default;
  matmul_plan(const matmul_plan&) = delete;
  matmul_plan& operator=(const matmul_plan&) = delete;
  ~matmul_plan() {
    for (cublasLtMatrixLayout_t layout : {a, b, addend, c})
      if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
    if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
  }
};

}  // namespace detail

/// A step recorded as a CUDA graph (ops/replay.hpp).
class recording {
 public:
  recording() = default;
  recording(recording&& other) noexcept : runs(other.runs), graph(std::exchange(other.graph, nullptr)) {}
  recording& operator=(recording&&) = delete;
  ~recording() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }

  int runs = 0;
  cudaGraphExec_t graph = nullptr;
};

class context {
 public:
  using space = cuda::space;
  using recording = cuda::recording;

  /// Uses device `device` of those the driver shows. Throws cuda_error when there is none, it is too old, or this
  /// program has no code for it.
  explicit context(int device = 0) : device_(device) {
    int devices = 0;
    detail::check(cudaGetDeviceCount(&devices), "cuda: no device");
    if (device < 0 || device >= devices)
      throw cuda_error(message("cuda: there is no device ", device, ", the driver shows ", devices));
    detail::check(cudaGetDeviceProperties(&properties_, device), "cuda: device properties");
    if (properties_.major < 8)
      throw cuda_error(message("cuda: ", properties_.name, " has compute capability ", properties_.major, ".",
                               properties_.minor, ", at least 8.0 is needed"));
    detail::check(cudaSetDevice(device), "cuda: device");
    cudaFuncAttributes code;
    detail::check(cudaFuncGetAttributes(&code, detail::probe<>), "cuda: device code");
    detail::check(cudaStreamCreate(&stream_), "cuda: stream");
  }

  context(const context&) = delete;
  context& operator=(const context&) = delete;

  ~context() {
    cudaStreamSynchronize(stream_);
    if (scratch_ != nullptr) space::deallocate(scratch_, scratch_bytes_);
    if (counters_ != nullptr) space::deallocate(counters_, counters_count_ * sizeof(unsigned));
    cudaStreamDestroy(stream_);
  }

  void synchronize() const { detail::check(cudaStreamSynchronize(stream_), "cuda: synchronize"); }

  [[nodiscard]] int device() const { return device_; }
  [[nodiscard]] cudaStream_t stream() const { return stream_; }
  [[nodiscard]] const cudaDeviceProp& properties() const { return properties_; }
  [[nodiscard]] int multiprocessors() const { return properties_.multiProcessorCount; }

  /// Same inputs, same bits, in every run. Off by default: a scan's tiles then compose whatever is there of the tiles
  /// before them, which rounds differently from run to run, instead of waiting for the last. Everything else always
  /// keeps its order.
  bool deterministic = false;

  /// Kernels launched (and library products started) so far.
  [[nodiscard]] index_t launches() const { return launches_; }
  void count_launch() { ++launches_; }

  /// At least `bytes` of temporary device memory, aligned to 256, contents arbitrary; valid until the next operation
  /// on this context asks. Grows as needed, which a captured graph cannot do.
  [[nodiscard]] void* scratch(std::size_t bytes) {
    if (bytes > scratch_bytes_) {
      if (scratch_ != nullptr) space::deallocate(std::exchange(scratch_, nullptr), std::exchange(scratch_bytes_, 0));
      const std::size_t rounded = (bytes + (std::size_t{1} << 21) - 1) >> 21 << 21;
      scratch_ = space::allocate(rounded);
      scratch_bytes_ = rounded;
    }
    return scratch_;
  }

  /// `count` counters that are zero between kernels: a kernel that uses them sets them back.
  [[nodiscard]] unsigned* counters(std::size_t count) {
    if (count > counters_count_) {
      if (counters_ != nullptr) space::deallocate(std::exchange(counters_, nullptr), std::exchange(counters_count_, 0));
      const std::size_t rounded = (count + 4095) / 4096 * 4096;
      counters_ = static_cast<unsigned*>(space::allocate(rounded * sizeof(unsigned)));
      counters_count_ = rounded;
      detail::check(cudaMemsetAsync(counters_, 0, rounded * sizeof(unsigned), stream_), "cuda: counters");
    }
    return counters_;
  }

  /// cuBLASLt, opened when the first product asks for it.
  [[nodiscard]] cublasLtHandle_t cublas() {
    if (!cublas_) {
      cublasLtHandle_t handle = nullptr;
      if (const cublasStatus_t status = cublasLtCreate(&handle); status != CUBLAS_STATUS_SUCCESS)
        throw cuda_error(message("cuda: cuBLASLt: ", cublasLtGetStatusString(status)));
      cublas_.reset(handle);
    }
    return cublas_.get();
  }

  /// Plans of the products seen so far, by their description.
  [[nodiscard]] std::unordered_map<std::string, detail::matmul_plan>& matmul_plans() { return matmul_plans_; }

 private:
  int device_ = 0;
  cudaDeviceProp properties_ = {};
  cudaStream_t stream_ = nullptr;
  void* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  unsigned* counters_ = nullptr;
  std::size_t counters_count_ = 0;
  std::unique_ptr<cublasLtContext, detail::cublas_closer> cublas_;
  std::unordered_map<std::string, detail::matmul_plan> matmul_plans_;
  index_t launches_ = 0;
};

namespace detail {

/// Lets the kernel have `shared` bytes of dynamic shared memory.
template <class... Params>
void allow_shared(void (*kernel)(Params...), const char* what, std::size_t shared) {
  if (shared > 32 * 1024)  // there may be static shared memory beside it
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), what);
}

/// Queues kernel<<<grid, block, shared>>>(args…) and counts it; `what` opens the message when the device refuses.
template <class... Params, class... Args>
void launch(context& ctx, const char* what, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared,
            const Args&... args) {
  allow_shared(kernel, what, shared);
  kernel<<<grid, block, shared, ctx.stream()>>>(args...);
  check(cudaGetLastError(), what);
  ctx.count_launch();
}

/// Returns when the results of the kernel before this one are there.
__device__ inline void previous_done() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Lets the kernel after this one begin once every block of this one has come here or ended.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// The first statement of a kernel that launch_overlapped starts: it may begin while the kernel before it still runs,
/// and waits here until that one's results are there. Then the kernel after it may begin, too: what it reads before its
/// own wait must be older than this kernel.
__device__ inline void wait_for_previous() {
  previous_done();
  let_next_begin();
}

/// `launch` of a kernel that begins with wait_for_previous(), where the device can start kernels early: between the
/// short kernels of a decoded token that is a good part of the time.
template <class... Params, class... Args>
void launch_overlapped(context& ctx, const char* what, void (*kernel)(Params...), dim3 grid, dim3 block,
                       std::size_t shared, const Args&... args) {
  allow_shared(kernel, what, shared);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream();
  config.attrs = &early;
  config.numAttrs = ctx.properties().major >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Params(args)...), what);
  ctx.count_launch();
}

/// Hands out pieces of a block of memory, each aligned to 256 bytes; with no block, only adds up their sizes.
class carver {
 public:
  explicit carver(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(index_t count) {
    char* piece = block_ != nullptr ? block_ + used_ : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  [[nodiscard]] std::size_t bytes() const { return used_; }

 private:
  char* block_;
  std::size_t used_ = 0;
};

[[nodiscard]] RATPLUS_HD constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

/// Blocks for `count` items at `per_block`, at most `most`: kernels walk the rest in strides of the grid.
[[nodiscard]] inline unsigned grid_for(index_t count, index_t per_block, index_t most) {
  const index_t blocks = ceil_div(count, per_block);
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace detail
/// The first run allocates what the step needs, the second is captured, later ones launch the graph.
template <class F>
void replay_on(context& ctx, recording& step, F&& f) {
  if (step.runs++ == 0) {
    f();
    return;
  }
  if (step.graph == nullptr) {
    cudaGraph_t graph = nullptr;
    detail::check(cudaStreamBeginCapture(ctx.stream(), cudaStreamCaptureModeThreadLocal), "cuda: graph capture");
    f();
    detail::check(cudaStreamEndCapture(ctx.stream(), &graph), "cuda: graph capture");
    const cudaError_t status = cudaGraphInstantiate(&step.graph, graph, 0);
    cudaGraphDestroy(graph);
    detail::check(status, "cuda: graph");
  }
  detail::check(cudaGraphLaunch(step.graph, ctx.stream()), "cuda: graph launch");
  ctx.count_launch();
}

}  // namespace ratplus::cuda
