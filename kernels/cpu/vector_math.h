// exp, tanh, sin^2 and the activations made of them, lane by lane. Polynomials are minimax fits (Remez by reweighted
// least squares) whose error is below half a unit of float32's last place.
#pragma once

#include <type_traits>

#include "edge_kernels.h"
#include "simd.h"

namespace edge __attribute__((visibility("hidden"))) {

// Relative error below 2e-7. Arguments are clamped to [-86, 88], where results and their inverses are normal numbers.
EDGE_INLINE Float exp(Float x) {
  x = min(max(x, splat(-86.0f)), splat(88.0f));
  const Float shifted = x * 1.44269504f + kRounder, n = shifted - kRounder;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of ten bits
  Float p = r * 1.39505975e-3f + 8.36895406e-3f;
  p = p * r + 4.16662060e-2f;
  p = p * r + 1.66665182e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return reinterpret_cast<Float>(reinterpret_cast<Int>(p) + (reinterpret_cast<Int>(shifted) << 23));
}

EDGE_INLINE Float silu(Float x) { return x / (1.0f + exp(-x)); }

EDGE_INLINE Float tanh(Float x) {
  const Float size = max(x, -x), u = x * x;
  Float p = u * -5.60389413e-3f + 2.05516983e-2f;
  p = p * u - 5.37141003e-2f;
  p = p * u + 1.33311525e-1f;
  p = p * u - 3.33332717e-1f;
  const Float near = p * u * x + x, far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < 0.64f ? near : (x < 0.0f ? -far : far);
}

// z + sin(z)^2. The square has period pi: reduced with pi in four parts, of which the first three times any quotient
// up to 2^13 are exact.
EDGE_INLINE Float snake(Float z) {
  const Float k = (z * 0.318309886f + kRounder) - kRounder;
  Float r = z - k * 3.140625f;
  r = r - k * 9.67025757e-4f;
  r = r - k * 6.27711415e-7f;
  r = r - k * 1.21542013e-10f;
  const Float u = r * r;
  Float p = u * 2.59975036e-6f - 1.98064779e-4f;
  p = p * u + 8.33301526e-3f;
  p = p * u - 1.66666567e-1f;
  const Float sine = p * u * r + r;
  return sine * sine + z;
}

template <Activation kActivation>
EDGE_INLINE Float activation(Float x) {
  if constexpr (kActivation == Activation::kSilu) return silu(x);
  if constexpr (kActivation == Activation::kSnake) return snake(x);
  if constexpr (kActivation == Activation::kTanh) return tanh(x);
  return x;
}

// Calls `body` with the activation as a constant of its own type, so that loops are compiled once for each.
template <class Body>
EDGE_INLINE void with_activation(Activation which, const Body& body) {
  switch (which) {
    case Activation::kNone: return body(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kSilu: return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kSnake: return body(std::integral_constant<Activation, Activation::kSnake>{});
    case Activation::kTanh: return body(std::integral_constant<Activation, Activation::kTanh>{});
  }
}

}  // namespace edge
