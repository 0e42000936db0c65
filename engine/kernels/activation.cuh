// The activation of a gate: KIND, by its place in gate.ACTIVATIONS; below 0 there is none.

constexpr bool GATED = KIND >= 0;
constexpr float STEEPEST = 43.0f;  // beyond it a sigmoid is as good as zero, and the product of two exponentials is still a number

// All but one kind are x times the sigmoid of this.
__device__ inline float before_sigmoid(float x) { return KIND == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x); }

__device__ inline float activate(float x) {
  if (KIND == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  return __fdividef(x, 1.0f + __expf(-before_sigmoid(x)));
}

// Of two numbers, with one reciprocal: exponentials and reciprocals take far longer than all the rest.
__device__ inline void activate_two(float& x, float& y) {
  if (KIND == 1) {
    x = activate(x), y = activate(y);
    return;
  }
  const float a = 1.0f + __expf(min(-before_sigmoid(x), STEEPEST)), b = 1.0f + __expf(min(-before_sigmoid(y), STEEPEST));
  const float of_both = __fdividef(1.0f, a * b);
  x *= b * of_both, y *= a * of_both;
}
