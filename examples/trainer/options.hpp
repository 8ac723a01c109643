#pragma once
// What the command line says, as plain values. No command-line library is seen here, so that the .cu can include it.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "ratplus/core/index.hpp"
#include "ratplus/io/token_file.hpp"
#include "ratplus/nn/config.hpp"
#include "ratplus/pattern/schedule.hpp"

namespace trainer {

using ratplus::index_t;
using ratplus::token_t;

/// A schedule and the text it was written as.
struct named_schedule {
  std::string name;
  ratplus::any_schedule schedule;
};

struct data_options {
  std::vector<std::string> files;
  std::optional<ratplus::io::token_format> format = {};  // absent: bytes for a vocabulary of 256, else uint16
};

/// Everything `pretrain` and `adapt` share.
struct training_options {
  data_options data = {};
  data_options held_out = {};   // files evaluated while training; none: the last part of `data`
  double held_out_part = 0.05;  // how much of `data` that is; 0: nothing
  std::string out = {};
  bool resume = false;

  index_t iterations = 0, batch = 16, micro_batches = 1;
  index_t seq_len = 0;
  double lr = 0, eta_min = 1e-6, warmup = 0;
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1, clip = 1;
  std::uint64_t seed = 1;

  // These do not change what is learnt.
  index_t save_every = 100, eval_every = 100, eval_tokens = 65536, report_every = 20;
};

struct pretrain_options {
  training_options training = {.iterations = 400, .seq_len = 256, .lr = 8e-4, .warmup = 0.05};
  ratplus::model_config config = {.vocab_size = 256, .d_model = 128, .num_heads = 4, .num_layers = 4};
  named_schedule sparse = {};  // of the sparse half
  bool joint = true;
};

struct adapt_options {
  training_options training = {.iterations = 80, .lr = 8e-5, .seed = 2};  // other batches than pretraining's
  std::string model;
  named_schedule pattern = {};
};

struct eval_options {
  std::string model;
  data_options data;
  double last_part = 1;  // evaluate this much of the data, its end
  std::vector<named_schedule> patterns;
  index_t seq_len = 0, batch = 16;  // seq_len 0: the model's
  std::optional<index_t> text_bytes = {};
  std::string json;
};

struct generate_options {
  std::string model;
  named_schedule pattern = {"dense", {}};
  std::string prompt;
  index_t tokens = 200, top_k = 0;
  double temperature = 0.8, top_p = 1;
  std::uint64_t seed = 1;
};

/// `logits` and `grads`.
struct tensor_options {
  std::string model, tokens, out;
  named_schedule pattern = {};
  std::optional<index_t> prefill = {};
};
struct logits_options : tensor_options {};
struct grads_options : tensor_options {};

using command =
    std::variant<pretrain_options, adapt_options, eval_options, generate_options, logits_options, grads_options>;

enum class device_kind { cpu, cuda };
enum class precision_kind { float32, bfloat16 };

struct device_options {
  std::optional<device_kind> kind = {};
  std::optional<precision_kind> precision = {};  // absent: float32 on the CPU, bfloat16 on a GPU
  int threads = 0;                               // 0: as many as there are cores
};

struct command_line {
  device_options device;
  command what;
};

/// Reads the command line. Prints and ends the program for --help; throws usage_error for a wrong one.
struct usage_error : ratplus::error {
  using error::error;
};
[[nodiscard]] command_line parse(int argc, char** argv);

/// Runs a command on a device; returns the exit status.
int run_on_cpu(const device_options& device, const command& what);
int run_on_cuda(const device_options& device, const command& what);

}  // namespace trainer
