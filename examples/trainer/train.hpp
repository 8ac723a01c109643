#pragma once
// The training loop of `pretrain` and `adapt`: batches, steps, evaluation, checkpoints, and going on from one.

#include <cmath>
#include <filesystem>
#include <future>

#include "evaluate.hpp"
#include "ratplus/io/checkpoint.hpp"
#include "ratplus/train/joint_step.hpp"
#include "report.hpp"

namespace trainer {

/// What distinguishes a run from others.
struct run_plan {
  const training_options& options;
  ratplus::model_config config;
  named_schedule pattern;  // of the sparse half, or of the only one
  bool joint = false;
  std::string options_text;
  std::vector<named_schedule> evaluated;
};

/// Where the tokens of a run come from.
struct run_data {
  ratplus::io::token_stream learnt_from;
  std::optional<ratplus::io::token_stream> evaluated_on;
  token_range learnt, held_out;

  run_data(const training_options& o, const ratplus::model_config& config)
      : learnt_from(open_stream(o.data, config.vocab_size)),
        evaluated_on(open_held_out(o, config)),
        learnt(learnt_from, 0, learnt_from.size() - kept_back(o), config.ignore_token),
        held_out(evaluated_on ? token_range(*evaluated_on, 0, evaluated_on->size(), config.ignore_token)
                              : token_range(learnt_from, learnt.size(), learnt_from.size(), config.ignore_token)) {
    learnt.require(o.seq_len, "--data");
    if (evaluated_on) held_out.require(1, "--eval-data");
  }
  run_data(const run_data&) = delete;
  run_data& operator=(const run_data&) = delete;

 private:
  static std::optional<ratplus::io::token_stream> open_held_out(const training_options& o,
                                                                const ratplus::model_config& config) {
    if (o.held_out.files.empty()) return std::nullopt;
    return open_stream({o.held_out.files, o.data.format}, config.vocab_size);
  }
  [[nodiscard]] index_t kept_back(const training_options& o) const {
    if (evaluated_on) return 0;
    return static_cast<index_t>(o.held_out_part * static_cast<double>(learnt_from.size()));
  }
};

/// Refuses to write over another model, and makes the folder of a new run.
inline void prepare_folder(const training_options& o) {
  namespace fs = std::filesystem;
  if (o.resume) return;
  std::error_code failed;
  for (const std::string& file : {ratplus::io::model_path(o.out), ratplus::io::training_path(o.out)})
    if (fs::exists(file, failed))
      throw ratplus::io_error(ratplus::message(file,
                                               ": exists already; --resume goes on with it, "
                                               "another --out keeps it"));
  fs::create_directories(o.out, failed);
  if (failed) throw ratplus::io_error(ratplus::message(o.out, ": cannot make the folder: ", failed.message()));
}

/// One run; the model's parameters are where it begins. Returns the exit status.
template <ratplus::Context Ctx, class Model>
int train(Ctx& ctx, Model& model, const run_plan& plan, const run_data& data) {
  const training_options& o = plan.options;
  catch_stop_signals();
  const std::string checkpoint = ratplus::io::training_path(o.out);
  ratplus::training<Model> training(
      ctx, model, {.beta1 = o.beta1, .beta2 = o.beta2, .epsilon = o.epsilon, .weight_decay = o.weight_decay}, o.clip);
  const ratplus::cosine_schedule lr{.lr = o.lr, .eta_min = o.eta_min, .warmup = o.warmup, .iterations = o.iterations};

  index_t done = 0, saved = -1;
  if (o.resume) {
    const ratplus::io::training_source source = ratplus::io::open_training(checkpoint);
    if (!(source.config == plan.config))
      throw ratplus::value_error(
          ratplus::message(checkpoint, ": is of another model, ", ratplus::io::config_text(source.config)));
    check_same_options(checkpoint, source.options, plan.options_text);
    ratplus::io::load_training(ctx, source, model, training);
    done = saved = source.iteration;
  }
  run_log log((std::filesystem::path(o.out) / "log.jsonl").string(), done);
  progress shown(done, o.iterations, o.batch * o.seq_len, o.report_every);
  shown.say(ratplus::message(plan.config.recurrence == "none" ? "attention" : plan.config.recurrence, ", ",
                             model.layout().count(), " parameters; ", data.learnt.size(), " tokens, ",
                             data.held_out.size(), " held out; ", plan.joint ? "joint: " : "", plan.pattern.name,
                             plan.joint ? " and dense" : ""));
  if (done > 0) shown.say(ratplus::message("going on after iteration ", done));

  const auto save = [&] {
    ratplus::io::save_training(ctx, checkpoint, model, training, done, plan.options_text);
    ratplus::io::save_model(ctx, o.out, model);
    saved = done;
  };
  const auto evaluate_held_out = [&] {
    if (data.held_out.size() < 2) return;
    named_numbers losses;
    std::string text = ratplus::message("iteration ", done, "  held out:");
    for (const named_schedule& p : plan.evaluated) {
      const double loss = evaluate(ctx, model, p.schedule, data.held_out, o.batch, o.seq_len, o.eval_tokens).loss();
      losses.emplace_back(p.name, loss);
      char number[32];
      std::snprintf(number, sizeof number, "%.4f", loss);
      text += "  " + p.name + " " + number;
    }
    log.evaluation(done, losses);
    shown.say(text);
  };

  // The next batch is cut while the device computes.
  const auto batch_of = [&](index_t i) {
    return std::async(std::launch::async, [&, i] { return data.learnt.random(o.batch, o.seq_len, o.seed, i); });
  };
  std::future<host_batch> next;
  if (done < o.iterations) next = batch_of(done);
  const auto start = std::chrono::steady_clock::now();
  while (done < o.iterations && stop_signal() == 0) {
    const host_batch batch = next.get();
    if (done + 1 < o.iterations) next = batch_of(done + 1);
    std::vector<ratplus::token_batch> parts;
    const index_t part = o.batch / o.micro_batches;
    for (index_t b = 0; b < o.batch; b += part) parts.push_back(batch.sequences(b, b + part));

    named_numbers values = {{"lr", lr(done)}};
    std::string losses;
    const auto add = [&](const char* half, const ratplus::step_report& report) {
      values.emplace_back(ratplus::message(half, "loss"), report.loss);
      values.emplace_back(ratplus::message(half, "grad_norm"), report.grad_norm);
      char text[48];
      std::snprintf(text, sizeof text, "%sloss %.4f", half, report.loss);
      losses += (losses.empty() ? "" : "  ") + std::string(text);
    };
    try {
      if (plan.joint) {
        const auto report = training.joint_step(ctx, plan.pattern.schedule, parts, lr(done));
        add("sparse_", report.sparse);
        add("", report.dense);
      } else {
        add("", training.step(ctx, plan.pattern.schedule, parts, lr(done)));
      }
    } catch (const ratplus::not_finite& e) {
      throw ratplus::not_finite(ratplus::message(
          "iteration ", done + 1, ": ", e.what(), "; ",
          saved >= 0 ? ratplus::message("the last good checkpoint is ", checkpoint, ", of iteration ", saved)
                     : "no checkpoint had been saved"));
    }
    values.emplace_back("seconds", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    log.iteration(++done, values);
    shown.step(done - 1, losses);

    const bool last = done == o.iterations;
    const bool evaluating = last || (o.eval_every > 0 && done % o.eval_every == 0);
    shown.pause();
    if (evaluating) evaluate_held_out();
    if (!last && done % o.save_every == 0) save();
    shown.resume();
  }
  if (next.valid()) next.wait();
  save();
  if (const int signal = stop_signal(); signal != 0 && done < o.iterations) {
    shown.say(ratplus::message("stopped after iteration ", done, ", saved in ", checkpoint, "; --resume goes on"));
    return 128 + signal;
  }
  shown.say(ratplus::message("saved in ", o.out));
  return 0;
}

}  // namespace trainer
