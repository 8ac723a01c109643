#pragma once
// Matrix products by cuBLASLt, but for those of few rows (detail/few_rows.cuh, few_rows_sm90.cuh). It thinks in
// columns: a row-major (M, N) matrix with rows `stride` apart is its column-major (N, M) one, so C = A · B is asked for
// as Cᵀ = Bᵀ · Aᵀ with the operands exchanged and nothing moved. Float products are float32 throughout (no tf32);
// bfloat16 products accumulate in float32. The library's choice of algorithm for a shape is asked for once and kept.

#include <cstring>

#include "ratplus/backend/cuda/detail/few_rows.cuh"
#include "ratplus/backend/cuda/detail/few_rows_sm90.cuh"
#include "ratplus/backend/cuda/memory.cuh"
#include "ratplus/ops/matmul.hpp"

namespace ratplus::cuda {

namespace detail {

inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) throw cuda_error(message(what, ": ", cublasLtGetStatusString(status)));
}

template <class T>
[[nodiscard]] constexpr cudaDataType cublas_type() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, bfloat16>,
                "ratplus: the CUDA backend multiplies float and bfloat16");
  return std::is_same_v<T, float> ? CUDA_R_32F : CUDA_R_16BF;
}

/// Workspace that the library's algorithms may use.
inline constexpr std::size_t matmul_workspace = std::size_t{32} << 20;

/// The power of two, up to 256, that divides the address.
[[nodiscard]] inline std::uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p) | 256;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

/// Everything that decides how a product is done.
struct matmul_key {
  index_t M, N, K, a_stride, b_stride, c_stride, addend_stride;
  std::uint32_t a_alignment, b_alignment, c_alignment, addend_alignment;
  std::int32_t type, c_type, transpose_a, transpose_b;
};

inline void make_plan(matmul_plan& plan, cublasLtHandle_t handle, const matmul_key& key) {
  const auto type = static_cast<cudaDataType>(key.type), c_type = static_cast<cudaDataType>(key.c_type);
  const auto u = [](index_t n) { return static_cast<std::uint64_t>(n); };
  check(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  const cublasOperation_t op_a = key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  check(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a), "matmul");
  check(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b), "matmul");
  const index_t b_rows = key.transpose_b ? key.N : key.K, b_columns = key.transpose_b ? key.K : key.N;
  const index_t a_rows = key.transpose_a ? key.K : key.M, a_columns = key.transpose_a ? key.M : key.K;
  check(cublasLtMatrixLayoutCreate(&plan.a, type, u(b_columns), u(b_rows), key.b_stride), "matmul");
  check(cublasLtMatrixLayoutCreate(&plan.b, type, u(a_columns), u(a_rows), key.a_stride), "matmul");
  check(cublasLtMatrixLayoutCreate(&plan.addend, c_type, u(key.N), u(key.M), key.addend_stride), "matmul");
  check(cublasLtMatrixLayoutCreate(&plan.c, c_type, u(key.N), u(key.M), key.c_stride), "matmul");

  cublasLtMatmulPreference_t wanted = nullptr;
  check(cublasLtMatmulPreferenceCreate(&wanted), "matmul");
  const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, decltype(&cublasLtMatmulPreferenceDestroy)>
      owner(wanted, &cublasLtMatmulPreferenceDestroy);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(wanted, what, &value, sizeof value), "matmul");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{matmul_workspace});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.addend_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c_alignment);
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, plan.operation, plan.a, plan.b, plan.addend,
                                                               plan.c, wanted, 1, &best, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0)
    throw cuda_error(message("matmul: cuBLASLt has no algorithm for (", key.M, " × ", key.K, ") · (", key.K, " × ",
                             key.N, "): ", cublasLtGetStatusString(status)));
  plan.algorithm = best.algo;
}

}  // namespace detail

template <class T, class TC>
void matmul_on(context& ctx, const matmul_args<T, TC>& p) {
  const index_t M = p.c.extent(0), N = p.c.extent(1), K = p.a.extent(p.transpose_a ? 0 : 1);
  const view<const TC, 2> addend = p.addend ? p.addend : view<const TC, 2>(p.c);
  if (K == 0) {  // nothing to add up; the library takes no empty matrices
    if (p.addend && p.addend.data() != p.c.data()) copy_on(ctx, p.addend, p.c);
    if (!p.addend)
      for (index_t m = 0; m < M; ++m) fill_on(ctx, p.c[m], TC(0.0f));
    return;
  }
  if constexpr (std::is_same_v<T, bfloat16>)
    if (!p.transpose_a && p.transpose_b && detail::aligned(p.a, 8)) {
      const detail::few_rows::sums_out<TC> out{p.c, p.addend};
      if (detail::few_rows::run(ctx, detail::few_rows::plain_rows{p.a}, out, p.b, M, p.b_is_parameter)) return;
      if (detail::few_rows::streams(ctx, p.a, out, p.b)) {
        detail::few_rows::run_streaming(ctx, p.a, out, p.b, p.b_is_parameter);
        return;
      }
    }
  // The stride of a single row means nothing; the library wants it to span the row all the same.
  const auto stride = [](const auto& v) { return v.extent(0) > 1 ? v.stride(0) : v.extent(1); };
  detail::matmul_key key;
  std::memset(&key, 0, sizeof key);
  key.M = M, key.N = N, key.K = K;
  key.a_stride = stride(p.a), key.b_stride = stride(p.b), key.c_stride = stride(p.c),
  key.addend_stride = stride(addend);
  key.a_alignment = detail::alignment_of(p.a.data()), key.b_alignment = detail::alignment_of(p.b.data());
  key.c_alignment = detail::alignment_of(p.c.data()), key.addend_alignment = detail::alignment_of(addend.data());
  key.type = detail::cublas_type<T>(), key.c_type = detail::cublas_type<TC>();
  key.transpose_a = p.transpose_a, key.transpose_b = p.transpose_b;

  auto& plans = ctx.matmul_plans();
  const auto [found, fresh] = plans.try_emplace(std::string(reinterpret_cast<const char*>(&key), sizeof key));
  if (fresh) try {
      detail::make_plan(found->second, ctx.cublas(), key);
    } catch (...) {
      plans.erase(found);
      throw;
    }
  const detail::matmul_plan& plan = found->second;
  const float alpha = 1, beta = p.addend ? 1 : 0;
  void* workspace = ctx.scratch(detail::matmul_workspace);
  detail::check(cublasLtMatmul(ctx.cublas(), plan.operation, &alpha, p.b.data(), plan.a, p.a.data(), plan.b, &beta,
                               addend.data(), plan.addend, p.c.data(), plan.c, &plan.algorithm, workspace,
                               detail::matmul_workspace, ctx.stream()),
                "matmul");
  ctx.count_launch();
}

}  // namespace ratplus::cuda
