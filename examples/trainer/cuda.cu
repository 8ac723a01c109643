// The commands on a GPU: products in bfloat16 unless float32 is asked for; master weights and optimiser in float32.

#include "commands.hpp"
#include "ratplus/cuda.cuh"

namespace trainer {

int run_on_cuda(const device_options& device, const command& what) {
  ratplus::cuda::context ctx;
  ctx.deterministic = true;  // a resumed run is the same run
  if (device.precision == precision_kind::float32) return run_command<float>(ctx, what);
  return run_command<ratplus::bfloat16>(ctx, what);
}

}  // namespace trainer
