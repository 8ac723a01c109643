#pragma once
// The reference cases of SPEC §8, in RATPLUS_GOLDEN_DIR.

#include <string>
#include <vector>

#include "ratplus/io/safetensors.hpp"
#include "support/array.hpp"

namespace ratplus_tests {

/// kind is ops, cases or model; set is golden or golden-attention.
[[nodiscard]] inline ratplus::io::safetensors_file golden(const std::string& kind, const std::string& set) {
  return ratplus::io::safetensors_file::open(std::string(RATPLUS_GOLDEN_DIR) + "/" + kind + "-" + set + ".safetensors");
}

template <class T, int R>
[[nodiscard]] array<T, R> golden_array(const ratplus::io::safetensors_file& file, const std::string& name) {
  const auto& shape = file.info(name).shape;
  if (shape.size() != R) throw ratplus::format_error("golden " + name + " has another rank");
  array<T, R> a;
  for (int i = 0; i < R; ++i) a.shape[i] = shape[static_cast<std::size_t>(i)];
  a.data = file.read_flat<T>(name);
  return a;
}

/// The middle parts of all names `<before><middle><after>`, in order.
[[nodiscard]] inline std::vector<std::string> golden_names(const ratplus::io::safetensors_file& file,
                                                           const std::string& before, const std::string& after) {
  std::vector<std::string> found;
  for (const std::string& name : file.names())
    if (name.size() > before.size() + after.size() && name.starts_with(before) && name.ends_with(after))
      found.push_back(name.substr(before.size(), name.size() - before.size() - after.size()));
  return found;
}

}  // namespace ratplus_tests
