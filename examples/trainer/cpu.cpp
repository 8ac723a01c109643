// The commands on the CPU, in float32.

#include "commands.hpp"
#include "ratplus/ratplus.hpp"

namespace trainer {

int run_on_cpu(const device_options& device, const command& what) {
  if (device.precision == precision_kind::bfloat16)
    throw ratplus::value_error("--precision: the CPU computes in float32, bfloat16 is for --device cuda");
  ratplus::cpu::context ctx(device.threads);
  return run_command<float>(ctx, what);
}

}  // namespace trainer
