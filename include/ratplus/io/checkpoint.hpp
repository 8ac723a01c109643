#pragma once
// Models and training runs as files (SPEC §6).
//
// A model is a folder: config.json and model.safetensors. A training checkpoint is ONE safetensors file — parameters,
// both moments of the optimiser, and in its metadata the counters, the config and the options of the run — so that no
// crash can leave parts of two iterations side by side: it is the old one or the new one, whole (io/atomic.hpp).
//
// Reading checks every name and shape against the config before a model is made, so a config that lies about sizes is
// an error and not an allocation.

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "ratplus/io/config_file.hpp"
#include "ratplus/io/safetensors.hpp"
#include "ratplus/nn/parameters.hpp"
#include "ratplus/ops/memory.hpp"
#include "ratplus/recurrence/by_name.hpp"
#include "ratplus/train/joint_step.hpp"

namespace ratplus::io {

namespace detail {

inline constexpr const char* tied_head = "head.lm_head.weight";  // the copy of the embedding that published files hold
inline constexpr const char* parameter_sets[] = {"parameter/", "adamw_m/", "adamw_v/"};  // of a training checkpoint

[[nodiscard]] inline parameter_layout layout_of(const model_config& config) {
  return visit_cell(config.recurrence,
                    [&](const auto& cell) { return parameter_layout(config, std::decay_t<decltype(cell)>::gated); });
}

/// Every tensor of `layout` is there under each prefix, floating-point and of its shape, and nothing else is.
inline void check_tensors(const safetensors_file& file, const parameter_layout& layout,
                          std::span<const char* const> prefixes) {
  const auto fail = [&](const std::string& name, const auto&... what) {
    throw format_error(message(file.path(), ": tensor ", excerpt(name), ": ", what...));
  };
  std::set<std::string> unknown;
  for (std::string& name : file.names()) unknown.insert(std::move(name));
  const auto expect = [&](const std::string& name, const std::vector<index_t>& shape) {
    if (!file.contains(name)) fail(name, "is missing, expected with shape ", shape_text(shape));
    const tensor_info& found = file.info(name);
    if (found.shape != shape) fail(name, "shape is ", shape_text(found.shape), ", expected ", shape_text(shape));
    if (found.type != dtype::f32 && found.type != dtype::bf16 && found.type != dtype::f64 && found.type != dtype::f16)
      fail(name, "dtype is ", name_of(found.type), ", expected F32 or BF16");
    unknown.erase(name);
  };
  for (const char* prefix : prefixes)
    for (const auto& e : layout.entries()) expect(prefix + e.name, e.shape);
  if (unknown.contains(tied_head)) expect(tied_head, layout.entries().front().shape);
  if (!unknown.empty()) fail(*unknown.begin(), "is not part of the model that the config describes");
}

/// Calls f(entry, view of the entry's elements in the flat buffer) for tensors of one and of two dimensions.
template <class T, class F>
void for_each_tensor(const parameter_layout& layout, T* flat, F&& f) {
  for (const auto& e : layout.entries())
    if (e.shape.size() == 2)
      f(e, as_view(flat + e.offset, e.shape[0], e.shape[1]));
    else
      f(e, as_view(flat + e.offset, e.shape[0]));
}

/// Fills a flat buffer of the context's space from the file's tensors under `prefix`.
template <Context Ctx, class A>
void read_flat(Ctx& ctx, const safetensors_file& file, const char* prefix, const parameter_layout& layout,
               view<A, 1> flat) {
  std::vector<A> host(static_cast<std::size_t>(layout.size()), A(0));
  for_each_tensor(layout, host.data(), [&](const auto& e, auto values) { file.read_into(prefix + e.name, values); });
  upload(ctx, static_cast<const A*>(host.data()), flat);
}

/// A flat buffer's copy in host memory.
template <Context Ctx, class A>
[[nodiscard]] std::vector<A> to_host(Ctx& ctx, view<const A, 1> flat) {
  std::vector<A> host(static_cast<std::size_t>(flat.size()));
  download(ctx, flat, host.data());
  return host;
}

template <class A>
void add_flat(safetensors_writer& writer, const char* prefix, const parameter_layout& layout,
              const std::vector<A>& host) {
  for_each_tensor(layout, host.data(), [&](const auto& e, auto values) { writer.add(prefix + e.name, values); });
}

}  // namespace detail

[[nodiscard]] inline std::string config_path(const std::string& folder) {
  return (std::filesystem::path(folder) / "config.json").string();
}
[[nodiscard]] inline std::string model_path(const std::string& folder) {
  return (std::filesystem::path(folder) / "model.safetensors").string();
}
[[nodiscard]] inline std::string training_path(const std::string& folder) {
  return (std::filesystem::path(folder) / "training.safetensors").string();
}

/// A model folder, opened and checked; nothing is loaded yet.
struct model_source {
  model_config config;
  safetensors_file file;
};

/// Throws io_error, format_error or value_error, naming file, field or tensor, what was expected and what was found.
[[nodiscard]] inline model_source open_model(const std::string& folder) {
  model_source source{read_config(config_path(folder)), safetensors_file::open(model_path(folder))};
  constexpr const char* prefix[] = {""};
  detail::check_tensors(source.file, detail::layout_of(source.config), prefix);
  return source;
}

/// Fills the parameters of a model of source.config.
template <Context Ctx, class Model>
void load_model(Ctx& ctx, const model_source& source, Model& model) {
  detail::read_flat(ctx, source.file, "", model.layout(), model.parameters());
  model.parameters_changed(ctx);
}

/// Writes the folder's files, each all or nothing; makes the folder when it is not there.
template <Context Ctx, class Model>
void save_model(Ctx& ctx, const std::string& folder, const Model& model) {
  const auto host = detail::to_host(ctx, model.parameters());
  safetensors_writer writer;
  detail::add_flat(writer, "", model.layout(), host);
  writer.set_metadata("config", config_text(model.config()));
  std::error_code failed;
  std::filesystem::create_directories(folder, failed);
  if (failed) throw io_error(message(folder, ": cannot make the folder: ", failed.message()));
  write_config(config_path(folder), model.config());
  writer.write(model_path(folder));
}

/// A training checkpoint, opened and checked; nothing is loaded yet.
struct training_source {
  model_config config;
  index_t iteration = 0;        // iterations done
  index_t optimizer_steps = 0;  // updates done
  std::string options;          // as given to save_training
  safetensors_file file;
};

/// Throws as open_model does.
[[nodiscard]] inline training_source open_training(const std::string& path) {
  safetensors_file file = safetensors_file::open(path);
  const auto field = [&](const char* name) -> const std::string& {
    const auto found = file.metadata().find(name);
    if (found == file.metadata().end())
      throw format_error(message(path, ": not a training checkpoint, its metadata has no ", name));
    return found->second;
  };
  const auto number = [&](const char* name) { return parse_number(field(name), message(path, ": ", name)); };
  training_source source{.config = parse_config(field("config"), path),
                         .iteration = number("iteration"),
                         .optimizer_steps = number("optimizer_steps"),
                         .options = field("options"),
                         .file = std::move(file)};
  detail::check_tensors(source.file, detail::layout_of(source.config), detail::parameter_sets);
  return source;
}

/// Fills the parameters of a model of source.config and the optimiser's state: the run goes on exactly.
template <Context Ctx, class Model>
void load_training(Ctx& ctx, const training_source& source, Model& model, training<Model>& run) {
  auto& optimizer = run.optimizer();
  const view<typename Model::A, 1> buffers[] = {model.parameters(), optimizer.m(), optimizer.v()};
  for (std::size_t i = 0; i < std::size(buffers); ++i)
    detail::read_flat(ctx, source.file, detail::parameter_sets[i], model.layout(), buffers[i]);
  optimizer.resume_at(source.optimizer_steps);
  model.parameters_changed(ctx);
}

/// Writes the checkpoint of a run after `iteration` iterations, all or nothing. `options` is the caller's own text.
template <Context Ctx, class Model>
void save_training(Ctx& ctx, const std::string& path, Model& model, training<Model>& run, index_t iteration,
                   const std::string& options) {
  using A = typename Model::A;
  auto& optimizer = run.optimizer();
  const view<const A, 1> buffers[] = {model.parameters(), optimizer.m(), optimizer.v()};
  std::vector<std::vector<A>> host;
  safetensors_writer writer;
  for (const auto& buffer : buffers) host.push_back(detail::to_host(ctx, buffer));
  for (std::size_t i = 0; i < host.size(); ++i)
    detail::add_flat(writer, detail::parameter_sets[i], model.layout(), host[i]);
  writer.set_metadata("config", config_text(model.config()));
  writer.set_metadata("iteration", std::to_string(iteration));
  writer.set_metadata("optimizer_steps", std::to_string(optimizer.steps()));
  writer.set_metadata("options", options);
  writer.write(path);
}

}  // namespace ratplus::io
