// `ratplus COMMAND`: trains, adapts, evaluates and runs RAT+ models. Errors are one line on standard error; the exit
// status is 1, or 2 for a wrong command line.

#include <algorithm>
#include <iostream>
#include <new>
#include <string>

#include "options.hpp"

namespace trainer {
namespace {

int run(const command_line& line) {
  const auto& [device, what] = line;
  if (device.kind != device_kind::cuda) return run_on_cpu(device, what);
#if defined(RATPLUS_TRAINER_CUDA)
  return run_on_cuda(device, what);
#else
  throw ratplus::value_error("--device: this program was built without CUDA; configure with -DRATPLUS_CUDA=ON");
#endif
}

int fail(std::string what, int status) {
  std::replace(what.begin(), what.end(), '\n', ' ');
  std::cerr << "ratplus: error: " << what << std::endl;
  return status;
}

}  // namespace
}  // namespace trainer

int main(int argc, char** argv) {
  try {
    return trainer::run(trainer::parse(argc, argv));
  } catch (const trainer::usage_error& e) {
    return trainer::fail(e.what(), 2);
  } catch (const std::bad_alloc&) {
    return trainer::fail("not enough memory", 1);
  } catch (const std::exception& e) {
    return trainer::fail(e.what(), 1);
  }
}
