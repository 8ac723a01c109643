#pragma once
// The `ratplus` program as its users have it: a process, its exit status and what it writes.

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "ratplus/io/checkpoint.hpp"
#include "support/array.hpp"
#include "support/scratch.hpp"

namespace ratplus_tests {

struct outcome {
  int status = -1;       // exit status, or 128 + signal
  std::string out, err;  // standard output and error
};

using arguments = std::vector<std::string>;

[[nodiscard]] inline arguments operator+(arguments a, const arguments& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// Runs `ratplus arguments…` to its end. When `now()` becomes true before, `signal` is sent, once.
[[nodiscard]] inline outcome run_trainer(const arguments& given, int signal = 0,
                                         const std::function<bool()>& now = {}) {
  const scratch_folder scratch;
  const std::string out = scratch / "out", err = scratch / "err";
  std::vector<const char*> argv{RATPLUS_TRAINER};
  for (const std::string& argument : given) argv.push_back(argument.c_str());
  argv.push_back(nullptr);
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const int to_out = ::open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    const int to_err = ::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ::dup2(to_out, STDOUT_FILENO);
    ::dup2(to_err, STDERR_FILENO);
    ::execv(argv[0], const_cast<char* const*>(argv.data()));
    ::_exit(127);
  }
  int status = 0;
  bool sent = false;
  while (::waitpid(child, &status, signal != 0 && !sent ? WNOHANG : 0) == 0) {
    if (now()) sent = ::kill(child, signal) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_file(out), read_file(err)};
}

/// The same, which must succeed; returns its standard output.
inline std::string trainer_output(const arguments& given) {
  const outcome o = run_trainer(given);
  INFO(o.err);
  REQUIRE(o.status == 0);
  return o.out;
}

/// The message of the error with which the program ends: one line, the last of standard error.
[[nodiscard]] inline std::string trainer_error(const arguments& given, int status = 1) {
  const outcome o = run_trainer(given);
  INFO(o.err);
  CHECK(o.status == status);
  const std::string begin = "ratplus: error: ";
  const auto at = o.err.rfind(begin);
  REQUIRE(at != std::string::npos);
  REQUIRE((at == 0 || o.err[at - 1] == '\n'));
  REQUIRE(o.err.find('\n', at) == o.err.size() - 1);
  return o.err.substr(at + begin.size(), o.err.size() - at - begin.size() - 1);
}

[[nodiscard]] inline bool says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

[[nodiscard]] inline std::string golden_file(const std::string& name) {
  return std::string(RATPLUS_GOLDEN_DIR) + "/" + name + ".safetensors";
}

/// Makes a model folder of a golden model.
inline void make_golden_model(const std::string& name, const std::string& folder) {
  const std::string from = golden_file("model-" + name);
  std::filesystem::create_directories(folder);
  std::filesystem::copy_file(from, ratplus::io::model_path(folder));
  write_file(ratplus::io::config_path(folder), ratplus::io::safetensors_file::open(from).metadata().at("config"));
}

/// A tensor as an array of one dimension.
[[nodiscard]] inline array<float, 1> flat(const ratplus::io::safetensors_file& file, const std::string& name) {
  array<float, 1> a;
  a.data = file.read_flat<float>(name);
  a.shape[0] = static_cast<index_t>(a.data.size());
  return a;
}

}  // namespace ratplus_tests
