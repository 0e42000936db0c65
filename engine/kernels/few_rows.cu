// The product of a few rows with a weight, and what comes before and after it in the same launch: a norm of the rows, an activation and
// gate, a residual sum. Such a product is as fast as its weight can be read, so all that matters is how.
//
//     out[r, o] = post(sum over k of norm(x)[r, k] * weight[o, k])
//
// A tensor core multiplies 16 x 16 numbers of the weight with 16 x 8 of x at once: eight rows cost what one does. Which of the inner
// indices is which inside an instruction does not matter, as long as both operands agree. So each thread takes 8 neighbours of the inner
// dimension, 16 bytes, and those are its operands of two instructions as they come: weights go from memory to where they are multiplied
// without a detour through shared memory.
//
// A block has 16 columns of the weight whole; its WARPS share the inner dimension, and their sums meet in shared memory. The first weights
// are on their way before the kernel before this one has ended (programmatic dependent launch). A warp can tell only a few of its loads
// apart when it waits for one, so it is many warps that keep memory busy, and not many loads of each; and rows are read again by each
// block, so their part of the first-level cache matters.
//
// Numbers are bfloat16: a row times the norm's weight is rounded before the norm's own factor, and has the range for it.
//
// Defined by who compiles this: WARPS, TILES (of eight rows), NORM (0: none; 1; 2: with a float32 weight), KIND (of activation; below 0: no
// gate), BIAS, ADD.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int DEPTH = 4;                                     // chunks of 32 of the inner dimension that are on their way
constexpr int AT_ONCE = TILES >= DEPTH ? 1 : DEPTH / TILES;  // chunks whose rows are loaded together
constexpr bool GATED = KIND >= 0;
constexpr int COLUMNS = GATED ? 8 : 16;                      // of the result: a gate's sixteen are eight, and what they are multiplied with

struct Quad { u32 a, b, c, d; };

// Of what no kernel of this step writes: it need not wait.
__device__ inline Quad load_constant(const void* at) {
  Quad q;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "l"(at));
  return q;
}

__device__ inline Quad load(const void* at) {
  Quad q;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "l"(at) : "memory");
  return q;
}

__device__ inline float low(u32 two) { return __uint_as_float(two << 16); }
__device__ inline float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }
__device__ inline u32 both(float l, float h) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(h), "f"(l)); return r; }

__device__ inline float number(const unsigned short* at) { return low((u32)*at); }

// c += a * b of 16 columns, 8 rows and 16 of the inner dimension.
__device__ inline void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float activate(float x) {
  if (KIND == 0) return x / (1.0f + __expf(-x));
  if (KIND == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x * (1.0f - 1.0f / (__expf(2.0f * inner) + 1.0f));
}

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

// x [rows, inner], a row every x_row numbers; weight [outs, inner], with a gate [2 * outs, inner]; out and add [rows, outs].
extern "C" __global__ void __launch_bounds__(32 * WARPS) few_rows(
    const unsigned short* __restrict__ x, const unsigned short* __restrict__ weight, const unsigned short* __restrict__ bias,
    const void* __restrict__ norm, const unsigned short* add, unsigned short* out, u64 x_row, int rows, int inner, int outs,
    float epsilon) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * COLUMNS;
  const int chunks = inner / 32;
  const unsigned short* mine[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = GATED ? i * outs + min(first + group, outs - 1) : min(first + i * 8 + group, outs - 1);
    mine[i] = weight + (u64)row * inner + quarter * 8;
  }
  Quad w[DEPTH][2], scales[DEPTH];
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    const int chunk = warp + j * WARPS;
    if (chunk >= chunks) continue;
#pragma unroll
    for (int i = 0; i < 2; i++) w[j][i] = load_constant(mine[i] + chunk * 32);
    if (NORM == 1) scales[j] = load_constant((const unsigned short*)norm + chunk * 32 + quarter * 8);
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const unsigned short* theirs[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) theirs[tile] = x + min(tile * 8 + group, rows - 1) * x_row + quarter * 8;
  float sums[TILES][4] = {}, squares[TILES] = {};
  for (int base = warp; base < chunks; base += DEPTH * WARPS) {
#pragma unroll
    for (int some = 0; some < DEPTH; some += AT_ONCE) {
      Quad given[AT_ONCE][TILES];  // loaded together: a wait for each would take longer than all the rest
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          if (base + (some + j) * WARPS < chunks) given[j][tile] = load(theirs[tile] + (base + (some + j) * WARPS) * 32);
#pragma unroll
      for (int j = some; j < some + AT_ONCE; j++) {
        const int chunk = base + j * WARPS;
        if (chunk >= chunks) break;
        float factors[8];
        if (NORM == 1) {
          spread(scales[j], factors);
        } else if (NORM == 2) {
#pragma unroll
          for (int i = 0; i < 8; i++) factors[i] = ((const float*)norm)[chunk * 32 + quarter * 8 + i];
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          Quad q = given[j - some][tile];
          if (NORM) squares[tile] += scale(q, factors);
          multiply(sums[tile], w[j][0].a, w[j][1].a, w[j][0].b, w[j][1].b, q.a, q.b);
          multiply(sums[tile], w[j][0].c, w[j][1].c, w[j][0].d, w[j][1].d, q.c, q.d);
        }
        const int next = chunk + DEPTH * WARPS;
        if (next >= chunks) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) w[j][i] = load_constant(mine[i] + next * 32);
        if (NORM == 1) scales[j] = load_constant((const unsigned short*)norm + next * 32 + quarter * 8);
      }
    }
  }
  // sums: of columns `group` and `group + 8` of the sixteen, rows `2 * quarter` and the next. squares: of row `group`, a quarter of them.
  __shared__ float parts[WARPS][TILES][2][8][8], lengths[WARPS][TILES * 8];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      parts[warp][tile][i][2 * quarter][group] = sums[tile][2 * i];
      parts[warp][tile][i][2 * quarter + 1][group] = sums[tile][2 * i + 1];
    }
    if (NORM) {
      squares[tile] += __shfl_xor_sync(~0u, squares[tile], 1);
      squares[tile] += __shfl_xor_sync(~0u, squares[tile], 2);
      if (quarter == 0) lengths[warp][tile * 8 + group] = squares[tile];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < TILES * 8 * COLUMNS; at += 32 * WARPS) {
    const int column = at % COLUMNS, row = at / COLUMNS, o = first + column;
    if (row >= rows || o >= outs) continue;
    float y = 0.0f, up = 0.0f, length = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) {
      y += parts[part][row / 8][column / 8][row % 8][column % 8];
      if (GATED) up += parts[part][row / 8][1][row % 8][column];
      if (NORM) length += lengths[part][row];
    }
    const float factor = NORM ? rsqrtf(length / inner + epsilon) : 1.0f;
    y *= factor;
    if (BIAS) y += number(bias + o);
    if (GATED) {
      up *= factor;
      if (BIAS) up += number(bias + outs + o);
      y = activate(y) * up;
    }
    if (ADD) y += number(add + (u64)row * outs + o);
    out[(u64)row * outs + o] = (unsigned short)both(y, y);
  }
}
