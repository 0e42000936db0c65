// What the two kernels of few rows, few_rows.cu and few_rows_bulk.cu, have in common.

__device__ inline void spread(const Quad& q, float* to) {
  to[0] = low(q.a), to[1] = high(q.a), to[2] = low(q.b), to[3] = high(q.b);
  to[4] = low(q.c), to[5] = high(q.c), to[6] = low(q.d), to[7] = high(q.d);
}

// Eight numbers of a row times the norm's weights; returns the sum of their squares before that.
__device__ inline float scale(Quad& q, const float* factors) {
  float x[8], squares = 0.0f;
  spread(q, x);
#pragma unroll
  for (int i = 0; i < 8; i++) squares += x[i] * x[i], x[i] *= factors[i];
  q = {both(x[0], x[1]), both(x[2], x[3]), both(x[4], x[5]), both(x[6], x[7])};
  return squares;
}

// The sum of what so many warps have, one number every `size`.
template <int COUNT>
__device__ inline float sum_of(const float* first, int size) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) sum += first[i * size];
  return sum;
}

// Write one number of the result: `y` is the sum of its column; `up`, with a gate, that of the column which it is multiplied with.
__device__ inline void finish(float y, float up, const unsigned short* bias, const unsigned short* add, unsigned short* out, int row, int o,
                              int outs) {
  if (BIAS) y += number(bias + o);
  if (GATED) {
    if (BIAS) up += number(bias + outs + o);
    y = activate(y) * up;
  }
  if (ADD) y += number(add + (u64)row * outs + o);
  out[(u64)row * outs + o] = (unsigned short)both(y, y);
}

// Adapters of a step: the columns are those of tiles.py. A of a page begins at `data + page * page_size + a`, 16 rows for each slice; `sums`
// [jobs, slices, 16, 16], one block for each slice of a job.
struct Shrink {
  const unsigned short* data;
  const int* used;
  const s64 *tokens, *jobs, *tiles;
  float* sums;
  u64 page_size, a;
  int site, sites, slices;
};
