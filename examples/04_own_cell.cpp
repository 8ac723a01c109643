// A recurrence of your own: a step and its adjoint for one channel. The library walks batches, heads, channels and
// positions, forward and backward, vectorised where the backend can.

#include <cmath>
#include <cstdio>
#include <random>
#include <ratplus/ratplus.hpp>

using namespace ratplus;

/// h_t = tanh(γ h_{t−1} + x_t) with γ = sigmoid(g_t).
struct squashed {
  static constexpr bool gated = true;  // the projection has a slice g

  template <class S>  // S is float, double, or as many floats as a register holds
  RATPLUS_HD S step(S h, S x, S g, index_t) const {
    return tanh_of(sigmoid(g) * h + x);
  }

  // From dh, the gradient of h_t: the gradients of h_{t−1}, of x_t and of g_t.
  template <class S>
  RATPLUS_HD cell_gradient<S> adjoint(S h, S x, S g, index_t, S dh) const {
    const S gamma = sigmoid(g), out = tanh_of(gamma * h + x), dsum = dh * (S(1) - out * out);
    return {gamma * dsum, dsum, h * gamma * (S(1) - gamma) * dsum};
  }

  [[nodiscard]] static std::string name() { return "squashed"; }

 private:
  template <class S>
  RATPLUS_HD static S tanh_of(S z) {
    return S(2) * sigmoid(z + z) - S(1);
  }
};

constexpr index_t B = 2, H = 2, T = 40, d = 24;

template <class S>
tensor<S, 4> random_heads(unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  auto x = make_tensor<S>(B, H, T, d);
  for (index_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<S>(normal(engine));
  return x;
}

template <class S>
double dot(const tensor<S, 4>& a, const tensor<S, 4>& b) {
  double sum = 0;
  for (index_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a.data()[i]) * static_cast<double>(b.data()[i]);
  return sum;
}

/// Compares the gradient along random directions with finite differences of Σ weight ⊙ h. Returns the relative error.
template <class S, class Ctx>
double check(Ctx ctx, double step) {
  auto x = random_heads<S>(1), gate = random_heads<S>(2), h = make_tensor<S>(B, H, T, d);
  auto weight = random_heads<S>(3), dx = make_tensor<S>(B, H, T, d), dgate = make_tensor<S>(B, H, T, d);

  const auto forward = [&](tensor<S, 4>& at_x, tensor<S, 4>& at_gate) {
    scan_forward_args<S> p;  // the scan carries keys and values; one of the two is enough here
    p.k = at_x;
    p.gate = at_gate;
    p.k_out = h;
    scan_forward(ctx, squashed{}, p);
    return dot(h, weight);
  };
  forward(x, gate);

  scan_backward_args<S> p;
  p.k = x;
  p.gate = gate;
  p.k_out = h;
  p.dk_out = weight;  // the gradient of Σ weight ⊙ h
  p.dk = dx;
  p.dgate = dgate;
  scan_backward(ctx, squashed{}, p);

  const auto along_x = random_heads<S>(4), along_gate = random_heads<S>(5);
  const auto moved = [&](double by) {
    auto new_x = random_heads<S>(1), new_gate = random_heads<S>(2);
    for (index_t i = 0; i < x.size(); ++i) {
      new_x.data()[i] += static_cast<S>(by) * along_x.data()[i];
      new_gate.data()[i] += static_cast<S>(by) * along_gate.data()[i];
    }
    return forward(new_x, new_gate);
  };
  const double expected = (moved(step) - moved(-step)) / (2 * step);
  return std::fabs(dot(dx, along_x) + dot(dgate, along_gate) - expected) / std::fabs(expected);
}

int main() {
  static_assert(Cell<squashed> && !AssociativeCell<squashed>);  // not affine in h: scanned in order, never in chunks
  const double loops = check<double>(reference::context{}, 1e-6), fast = check<float>(cpu::context{}, 1e-2);
  std::printf("gradient against finite differences: %.1e in double by plain loops, %.1e in float on the CPU backend\n",
              loops, fast);
  return loops < 1e-8 && fast < 1e-2 ? 0 : 1;
}
