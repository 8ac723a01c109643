// The command line, read with CLI11.

#include "options.hpp"

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <map>

#include "ratplus/pattern/parse.hpp"
#include "ratplus/recurrence/by_name.hpp"

namespace trainer {

namespace {

/// Finite (a comparison with a NaN would let it pass) and within bounds.
CLI::Validator between(double least, double most) {
  std::ostringstream name;
  if (most < std::numeric_limits<double>::max())
    name << "in [" << least << " - " << most << "]";
  else
    name << "at least " << least;
  const std::string range = name.str();
  return {[=](std::string& text) -> std::string {
            double value = 0;
            if (CLI::detail::lexical_cast(text, value) && value >= least && value <= most) return {};
            return text + " is not a number " + range;
          },
          range, "between"};
}

const auto unbounded = std::numeric_limits<double>::max();
const CLI::Validator count = between(1, ratplus::max_position);
const CLI::Validator count_or_zero = between(0, ratplus::max_position);

/// An option that takes one of a few words.
template <class Out, class Value = typename Out::value_type>
CLI::Option* add_choice(CLI::App& app, const std::string& name, Out& out, const std::map<std::string, Value>& words,
                        const char* help) {
  std::string list;
  for (const auto& word : words) list += (list.empty() ? "" : ", ") + word.first;
  return app
      .add_option_function<std::string>(
          name,
          [=, &out](const std::string& text) {
            const auto found = words.find(text);
            if (found == words.end()) throw usage_error(name + ": " + ratplus::excerpt(text) + " is none of " + list);
            out = found->second;
          },
          help)
      ->type_name("{" + list + "}");
}

CLI::Option* add_pattern(CLI::App& app, const char* name, named_schedule& out, const char* help) {
  return app
      .add_option_function<std::string>(
          name,
          [name, &out](const std::string& text) {
            try {
              out = {text, ratplus::parse_schedule(text)};
            } catch (const ratplus::value_error& e) {
              throw usage_error(std::string(name) + ": " + e.what());
            }
          },
          help)
      ->type_name("PATTERN");
}

CLI::Option* add_model(CLI::App& app, std::string& folder) {
  return app.add_option("--model", folder, "Folder of the model")->required()->type_name("DIR");
}

void add_data(CLI::App& app, data_options& data, const char* help) {
  app.add_option("--data", data.files, help)->required()->type_name("FILE");
  using ratplus::io::token_format;
  add_choice(app, "--format", data.format,
             {{"bytes", token_format::bytes}, {"uint16", token_format::uint16}, {"uint32", token_format::uint32}},
             "What the files hold (default: bytes for a vocabulary of 256, else uint16 ids)");
}

void add_training(CLI::App& app, training_options& t) {
  add_data(app, t.data, "Text or token files to learn from");
  app.add_option("--out", t.out, "Folder to make: model, training checkpoint, log.jsonl")->required()->type_name("DIR");
  app.add_flag("--resume", t.resume, "Go on from the checkpoint in --out; give the other options as before");
  auto* files =
      app.add_option("--eval-data", t.held_out.files, "Files to evaluate on while training")->type_name("FILE");
  app.add_option("--held-out", t.held_out_part, "Without --eval-data: keep this part of the data, its end, for that")
      ->check(between(0, 0.9))
      ->excludes(files)
      ->capture_default_str();

  const std::string group = "Hyper-parameters";
  const auto add = [&](const char* name, auto& value, const CLI::Validator& check, const char* help) {
    app.add_option(name, value, help)->check(check)->capture_default_str()->group(group);
  };
  add("--iterations", t.iterations, count, "Iterations (a joint one takes two optimiser steps)");
  add("--batch", t.batch, count, "Sequences in a batch");
  add("--micro-batches", t.micro_batches, count, "Parts in which a batch is computed");
  add("--lr", t.lr, between(0, unbounded), "Highest learning rate");
  add("--min-lr", t.eta_min, between(0, unbounded), "Learning rate at the end of the cosine");
  add("--warmup", t.warmup, between(0, 1), "Part of the iterations that warms up");
  add("--beta1", t.beta1, between(0, 1), "AdamW");
  add("--beta2", t.beta2, between(0, 1), "AdamW");
  add("--epsilon", t.epsilon, between(0, unbounded), "AdamW");
  add("--weight-decay", t.weight_decay, between(0, unbounded), "AdamW");
  add("--clip", t.clip, between(0, unbounded), "Highest norm of the gradient");
  add("--seed", t.seed, between(0, 1e18), "Of the initial weights and the batches");
  add("--save-every", t.save_every, count, "Iterations between checkpoints");
  add("--eval-every", t.eval_every, count_or_zero, "Iterations between evaluations (0: at the end only)");
  add("--eval-tokens", t.eval_tokens, count, "Tokens of an evaluation while training, at most");
  add("--report-every", t.report_every, count, "Iterations between lines when the output is no terminal");
}

void check_parts(const training_options& t) {
  if (t.batch % t.micro_batches != 0)
    throw usage_error(
        ratplus::message("--micro-batches: ", t.micro_batches, " parts do not divide a batch of ", t.batch));
}

void add_pretrain(CLI::App& app, pretrain_options& o) {
  add_training(app, o.training);
  add_pattern(app, "--sparse", o.sparse, "Pattern of the sparse half (default: dilated:64)");
  o.sparse = {"dilated:64", ratplus::parse_schedule("dilated:64")};
  o.config.recurrence = "gated_average";
  auto* joint = app.add_flag("--joint,!--no-joint", o.joint,
                             "Train every batch under --sparse, then under dense "
                             "(default: with a recurrence)");
  auto* name = app.add_option("--recurrence", o.config.recurrence, "Cell: gated_average, none or chunked:L")
                   ->capture_default_str();
  auto* without = app.add_flag_callback(
                         "--no-recurrence", [&o] { o.config.recurrence = "none"; },
                         "The attention baseline: no recurrence, and no joint training unless --joint is given")
                      ->excludes(name);
  const std::string group = "Sizes";
  const auto add = [&](const char* option, index_t& value, const char* help) {
    return app.add_option(option, value, help)->check(count)->capture_default_str()->group(group);
  };
  add("--vocab-size", o.config.vocab_size, "Tokens (256 for bytes)");
  add("--d-model", o.config.d_model, "Channels");
  add("--heads", o.config.num_heads, "Heads");
  add("--layers", o.config.num_layers, "Layers");
  add("--d-ffn", o.config.d_ffn, "Feed-forward channels (default: 4 times --d-model)")->default_str("");
  add("--seq-len", o.training.seq_len, "Positions of a sequence");
  app.add_option("--rope-base", o.config.rope_base, "Base of the rotation angles")
      ->check(between(1, unbounded))
      ->capture_default_str()
      ->group(group);
  app.add_option("--end-of-text", o.config.ignore_token, "Token id after which nothing is predicted")
      ->check(count_or_zero)
      ->group(group);
  app.callback([&o, joint, without] {
    check_parts(o.training);
    if (joint->count() == 0) o.joint = o.config.recurrence != "none" && without->count() == 0;
    if (o.config.d_ffn == 0) o.config.d_ffn = 4 * o.config.d_model;
    o.config.max_seq_len = o.training.seq_len;
    try {
      validate(o.config);
      ratplus::visit_cell(o.config.recurrence, [](const auto&) {});
    } catch (const ratplus::value_error& e) {
      throw usage_error(e.what());
    }
  });
}

void add_adapt(CLI::App& app, adapt_options& o) {
  add_model(app, o.model);
  add_pattern(app, "--pattern", o.pattern, "The one pattern to adapt to")->required();
  add_training(app, o.training);
  app.add_option("--seq-len", o.training.seq_len, "Positions of a sequence (default: the model's)")->check(count);
  app.callback([&o] { check_parts(o.training); });
}

void add_eval(CLI::App& app, eval_options& o) {
  add_model(app, o.model);
  add_data(app, o.data, "Files to evaluate on");
  app.add_option_function<std::vector<std::string>>(
         "--pattern",
         [&o](const std::vector<std::string>& texts) {
           for (const std::string& text : texts) try {
               o.patterns.push_back({text, ratplus::parse_schedule(text)});
             } catch (const ratplus::value_error& e) {
               throw usage_error(std::string("--pattern: ") + e.what());
             }
         },
         "Patterns to evaluate under; may be given several times")
      ->required()
      ->type_name("PATTERN");
  app.add_option("--last-part", o.last_part, "Evaluate this part of the data, its end")
      ->check(between(0, 1))
      ->capture_default_str();
  app.add_option("--seq-len", o.seq_len, "Positions of a sequence (default: the model's)")->check(count);
  app.add_option("--batch", o.batch, "Sequences computed at once")->check(count)->capture_default_str();
  app.add_option("--text-bytes", o.text_bytes, "Bytes of text that the token files stand for, for bits per byte")
      ->check(between(1, 1e18));
  app.add_option("--json", o.json, "File to write the table to")->type_name("FILE");
}

void add_generate(CLI::App& app, generate_options& o) {
  add_model(app, o.model);
  add_pattern(app, "--pattern", o.pattern, "Pattern to read and write under (default: dense)");
  app.add_option("--prompt", o.prompt, "Text to continue")->required()->type_name("TEXT");
  app.add_option("--tokens", o.tokens, "Tokens to write")->check(count)->capture_default_str();
  app.add_option("--temperature", o.temperature, "0: always the most probable token")
      ->check(between(0, unbounded))
      ->capture_default_str();
  app.add_option("--top-k", o.top_k, "Choose among the k most probable (0: all)")
      ->check(count_or_zero)
      ->capture_default_str();
  app.add_option("--top-p", o.top_p, "Choose among the fewest tokens of this probability")
      ->check(between(1e-9, 1))
      ->capture_default_str();
  app.add_option("--seed", o.seed, "Of the choices")->check(between(0, 1e18))->capture_default_str();
}

void add_tensors(CLI::App& app, tensor_options& o, const char* in, const char* out) {
  add_model(app, o.model);
  app.add_option("--tokens", o.tokens, in)->required()->type_name("FILE");
  add_pattern(app, "--pattern", o.pattern, "Pattern of the pass")->required();
  app.add_option("--out", o.out, out)->required()->type_name("FILE");
}

void add_device(CLI::App& app, device_options& o) {
  add_choice(app, "--device", o.kind, {{"cpu", device_kind::cpu}, {"cuda", device_kind::cuda}},
             "Where to compute (default: cpu)")
      ->group("Device");
  add_choice(app, "--precision", o.precision,
             {{"float32", precision_kind::float32}, {"bfloat16", precision_kind::bfloat16}},
             "Of products and activations (default: float32 on the CPU, bfloat16 on a GPU)")
      ->group("Device");
  app.add_option("--threads", o.threads, "Threads of the CPU (0: as many as it has cores)")
      ->check(between(0, 1024))
      ->group("Device");
}

}  // namespace

command_line parse(int argc, char** argv) {
  CLI::App app(
      "RAT+: train dense, infer sparse.\nPATTERN is e.g. dense, dilated:16, dilated:16+local:256+sinks:4, "
      "local:1024+sinks:4;\na,b alternates layers, [a|b] divides the heads.",
      "ratplus");
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // of options with one value
  device_options device;
  pretrain_options pretrain;
  adapt_options adapt;
  eval_options eval;
  generate_options generate;
  logits_options logits;
  grads_options grads;
  const auto add = [&](const char* name, const char* help) {
    CLI::App* sub = app.add_subcommand(name, help);
    add_device(*sub, device);
    return sub;
  };
  add_pretrain(*add("pretrain", "Train a model, jointly under a sparse pattern and under dense"), pretrain);
  add_adapt(*add("adapt", "Adapt a pretrained model to one pattern"), adapt);
  add_eval(*add("eval", "Loss of a model under patterns"), eval);
  add_generate(*add("generate", "Continue a text"), generate);
  CLI::App* of_logits = add("logits", "Logits of given tokens");
  add_tensors(*of_logits, logits, "safetensors file with `tokens` (B, T) int32", "File to write `logits` (B, T, V) to");
  of_logits
      ->add_option("--prefill", logits.prefill,
                   "Positions below N in one prefill, the others decoded one at a time (default: one forward pass)")
      ->check(count_or_zero)
      ->type_name("N");
  add_tensors(*add("grads", "Loss and gradients of given tokens and labels"), grads,
              "safetensors file with `tokens` and `labels` (B, T) int32", "File to write `loss` and `grad/NAME` to");

  if (argc > 1 && argv[1][0] != '-') {
    std::string names;
    bool known = false;
    for (const CLI::App* sub : app.get_subcommands({})) {
      known = known || sub->get_name() == argv[1];
      names += (names.empty() ? "" : ", ") + sub->get_name();
    }
    if (!known) throw usage_error(ratplus::excerpt(argv[1]) + " is no command, expected " + names);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    std::exit(app.exit(e));
  } catch (const CLI::ParseError& e) {
    throw usage_error(e.what());
  }
  const std::string name = app.get_subcommands().front()->get_name();
  if (name == "pretrain") return {device, pretrain};
  if (name == "adapt") return {device, adapt};
  if (name == "eval") return {device, eval};
  if (name == "generate") return {device, generate};
  if (name == "logits") return {device, logits};
  return {device, grads};
}

}  // namespace trainer
