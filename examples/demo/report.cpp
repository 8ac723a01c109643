// demo_report FOLDER: what the runs of examples/demo.sh made, as one table and as a picture, FOLDER/demo.svg.
//
// FOLDER/MODEL/{log.jsonl,eval.json}: a pretrained model; FOLDER/MODEL/adapted/*/eval.json: adapted to one pattern
// each.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "ratplus/io/atomic.hpp"

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct eval_row {
  std::string pattern;
  double bits = 0, keys = 0, cache_bytes = 0;  // bits per byte; keys visited as a part of dense
};

struct curve {
  std::string name, colour;
  std::vector<std::pair<double, double>> points;  // optimiser steps, bits per byte
};

struct model {
  std::string name, colour;
  std::vector<eval_row> before;
  std::map<std::string, double> after;  // bits per byte by the pattern adapted to
  std::vector<curve> curves;
};

std::ifstream open(const fs::path& path) {
  std::ifstream in(path);
  if (!in) throw ratplus::io_error(path.string() + ": cannot open");
  return in;
}

std::vector<eval_row> read_rows(const fs::path& path) {
  std::vector<eval_row> rows;
  auto in = open(path);
  for (const json& row : json::parse(in))
    rows.push_back({row.at("pattern"), row.at("bits_per_byte"),
                    row.at("keys_visited").get<double>() / row.at("keys_visited_dense").get<double>(),
                    row.at("kv_cache_bytes")});
  return rows;
}

/// Running means over a twentieth of the run.
std::vector<std::pair<double, double>> smooth(const std::vector<double>& bits, double steps_each) {
  std::vector<std::pair<double, double>> points;
  const std::size_t span = std::max<std::size_t>(1, bits.size() / 20);
  double sum = 0;
  for (std::size_t i = 0; i < bits.size(); ++i) {
    sum += bits[i] - (i >= span ? bits[i - span] : 0);
    const auto n = static_cast<double>(std::min(i + 1, span));
    points.emplace_back(steps_each * (static_cast<double>(i) + 1 - n / 2), sum / n);
  }
  return points;
}

model read_model(const fs::path& folder, const std::string& name, const std::string& colour,
                 const std::string& second_colour) {
  model m{name, colour, read_rows(folder / "eval.json"), {}, {}};
  for (const auto& entry : fs::directory_iterator(folder / "adapted"))
    for (const eval_row& row : read_rows(entry.path() / "eval.json")) m.after[row.pattern] = row.bits;
  std::vector<double> dense, sparse;
  auto log = open(folder / "log.jsonl");
  for (std::string line; std::getline(log, line);) {
    const json entry = json::parse(line);
    const auto add = [&](std::vector<double>& to, const char* loss) {
      if (entry.contains(loss)) to.push_back(entry[loss].get<double>() / std::log(2.0));
    };
    add(dense, "loss");
    add(sparse, "sparse_loss");
  }
  const double steps = sparse.empty() ? 1 : 2;
  if (!sparse.empty()) m.curves.push_back({name + ", sparse half", second_colour, smooth(sparse, steps)});
  m.curves.push_back({sparse.empty() ? name : name + ", dense half", colour, smooth(dense, steps)});
  return m;
}

std::string number(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string change(const model& m, const eval_row& row) {
  const auto after = m.after.find(row.pattern);
  return number("%.3f", row.bits) + (after == m.after.end() ? "" : " → " + number("%.3f", after->second));
}

void print_table(const std::vector<model>& models) {
  const auto cell = [](const std::string& text, std::size_t width) {  // counts "→" as one
    const std::size_t arrows = text.find("→") == std::string::npos ? 0 : 2;
    return text + std::string(width + arrows > text.size() ? width + arrows - text.size() : 0, ' ');
  };
  std::cout << "held-out bits per byte, before → after adaptation to the pattern\n\n" << cell("pattern", 30);
  for (const model& m : models) std::cout << cell(m.name, 18);
  std::cout << cell("keys visited", 15) << "KV cache\n";
  for (std::size_t i = 0; i < models.front().before.size(); ++i) {
    const eval_row& first = models.front().before[i];
    std::cout << cell(first.pattern, 30);
    for (const model& m : models) std::cout << cell(change(m, m.before[i]), 18);
    std::cout << cell(number("%.1f %%", 100 * first.keys), 15) << number("%.0f bytes", first.cache_bytes) << "\n";
  }
}

// ---- the picture

constexpr const char* ink = "#1f2933";
constexpr const char* faint = "#d5dbe1";
constexpr const char* grey = "#62707d";

class drawing {
 public:
  drawing(double width, double height) {
    out_ << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << width << " " << height
         << "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\">\n<rect width=\"" << width
         << "\" height=\"" << height << "\" fill=\"white\"/>\n";
  }
  void line(double x1, double y1, double x2, double y2, const std::string& colour, double width = 1) {
    out_ << "<line x1=\"" << x1 << "\" y1=\"" << y1 << "\" x2=\"" << x2 << "\" y2=\"" << y2 << "\" stroke=\"" << colour
         << "\" stroke-width=\"" << width << "\"/>\n";
  }
  void text(double x, double y, const std::string& words, const std::string& colour = ink,
            const std::string& anchor = "start", const std::string& more = "") {
    std::string safe;
    for (const char c : words) safe += c == '&' ? "&amp;" : c == '<' ? "&lt;" : std::string(1, c);
    out_ << "<text x=\"" << x << "\" y=\"" << y << "\" fill=\"" << colour << "\" text-anchor=\"" << anchor << "\" "
         << more << ">" << safe << "</text>\n";
  }
  void dot(double x, double y, const std::string& colour, bool filled) {
    out_ << "<circle cx=\"" << x << "\" cy=\"" << y << "\" r=\"5\" stroke=\"" << colour
         << "\" stroke-width=\"2\" fill=\"" << (filled ? colour : "white") << "\"/>\n";
  }
  void path(const std::vector<std::pair<double, double>>& points, const std::string& colour) {
    out_ << "<polyline fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" stroke=\"" << colour
         << "\" points=\"";
    for (const auto& [x, y] : points) out_ << number("%.1f", x) << "," << number("%.1f", y) << " ";
    out_ << "\"/>\n";
  }
  [[nodiscard]] std::string finished() const { return out_.str() + "</svg>\n"; }

 private:
  std::ostringstream out_;
};

/// Numbers onto pixels.
struct scale {
  double from, to, pixel_from, pixel_to;
  double operator()(double value) const { return pixel_from + (value - from) / (to - from) * (pixel_to - pixel_from); }
};

/// Left: the training curves.
void draw_curves(drawing& d, const std::vector<model>& models, double left, double right, double top, double bottom) {
  double steps = 0, low = 8;
  for (const model& m : models)
    for (const curve& c : m.curves) {
      steps = std::max(steps, c.points.back().first);
      for (const auto& point : c.points) low = std::min(low, point.second);
    }
  steps = std::ceil(steps / 100) * 100;  // a curve ends half a span early
  const scale x{0, steps, left, right}, y{std::floor(low * 2) / 2, 5, bottom, top};
  d.text(left, top - 30, "Training loss, bits per byte", ink, "start", "font-weight=\"bold\" font-size=\"15\"");
  for (double bits = y.from; bits <= y.to + 1e-9; bits += 0.5) {
    d.line(left, y(bits), right, y(bits), faint);
    d.text(left - 8, y(bits) + 4, number("%.1f", bits), grey, "end");
  }
  for (int part = 0; part <= 4; ++part)
    d.text(x(steps * part / 4), bottom + 20, number("%.0f", std::round(steps * part / 4)), grey, "middle");
  d.text((left + right) / 2, bottom + 42, "optimiser steps", grey, "middle");
  double legend = top + 14;
  for (const model& m : models)
    for (const curve& c : m.curves) {
      std::vector<std::pair<double, double>> points;
      for (const auto& [step, bits] : c.points)
        if (bits <= y.to) points.emplace_back(x(step), y(bits));
      d.path(points, c.colour);
      d.line(right - 190, legend, right - 166, legend, c.colour, 3);
      d.text(right - 158, legend + 4, c.name, c.colour);
      legend += 20;
    }
}

/// Right: one row for each pattern, an arrow from before to after for each model.
void draw_patterns(drawing& d, const std::vector<model>& models, double left, double right, double top, double bottom) {
  double low = 8, high = 0;
  for (const model& m : models) {
    for (const eval_row& row : m.before) {
      low = std::min(low, row.bits);
      high = std::max(high, row.bits);
    }
    for (const auto& [pattern, bits] : m.after) low = std::min(low, bits);
  }
  const scale x{std::floor(low * 2) / 2, std::ceil(high * 2) / 2, left, right};
  const std::size_t rows = models.front().before.size();
  const scale y{-0.5, static_cast<double>(rows) - 0.5, top, bottom};
  const double labels = left - 235;
  d.text(labels, top - 30, "Held-out bits per byte under each pattern", ink, "start",
         "font-weight=\"bold\" font-size=\"15\"");
  for (double bits = x.from; bits <= x.to + 1e-9; bits += 0.5) {
    d.line(x(bits), top, x(bits), bottom, faint);
    d.text(x(bits), bottom + 20, number("%.1f", bits), grey, "middle");
  }
  d.dot(left + 40, bottom + 38, grey, false);
  d.text(left + 52, bottom + 42, "as pretrained", grey);
  d.dot(left + 170, bottom + 38, grey, true);
  d.text(left + 182, bottom + 42, "adapted to the pattern", grey);
  for (std::size_t i = 0; i < rows; ++i) {
    const eval_row& row = models.front().before[i];
    const double at = y(static_cast<double>(i));
    d.text(labels, at - 2, row.pattern);
    d.text(labels, at + 14,
           number("%.1f %% of the keys, ", 100 * row.keys) + number("%.0f KB cache", row.cache_bytes / 1000), grey,
           "start", "font-size=\"11\"");
    double offset = -9;
    for (const model& m : models) {
      const double before = x(m.before[i].bits);
      const auto after = m.after.find(row.pattern);
      if (after != m.after.end()) {
        d.line(before, at + offset, x(after->second), at + offset, m.colour, 2);
        d.dot(before, at + offset, m.colour, false);
        d.dot(x(after->second), at + offset, m.colour, true);
      } else {
        d.dot(before, at + offset, m.colour, false);
      }
      offset += 18;
    }
    if (i + 1 < rows) d.line(labels, y(static_cast<double>(i) + 0.5), right, y(static_cast<double>(i) + 0.5), faint);
  }
}

void draw(const std::vector<model>& models, const fs::path& path) {
  drawing d(1240, 470);
  draw_curves(d, models, 50, 500, 70, 400);
  draw_patterns(d, models, 800, 1215, 70, 400);
  double at = 800 + 415;
  for (const model& m : models) {
    d.text(at, 40, m.name, m.colour, "end", "font-weight=\"bold\"");
    at -= 110;
  }
  ratplus::io::write_atomically(path.string(), d.finished());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw ratplus::value_error("usage: demo_report FOLDER");
    const fs::path folder = argv[1];
    const std::vector<model> models{read_model(folder / "ratplus", "RAT+ joint", "#0b6e4f", "#7bc8a4"),
                                    read_model(folder / "attention", "attention", "#c8553d", "")};
    print_table(models);
    draw(models, folder / "demo.svg");
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "demo_report: error: " << e.what() << std::endl;
    return 1;
  }
}
