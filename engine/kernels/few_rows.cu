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
// A block has 16 columns of the weight, or twice that: its WARPS share the inner dimension, and their sums meet in shared memory. The first
// weights are on their way before the kernel before this one has ended (programmatic dependent launch). A warp can tell only a few of its
// loads apart when it waits for one, so it is many warps that keep memory busy, and not many loads of each; and rows are read again by each
// block, so their part of the first-level cache matters.
//
// Numbers are bfloat16: a row times the norm's weight is rounded before the norm's own factor, and has the range for it.
//
// What adapters add to the product begins in the same launch. The last blocks of the grid do what shrink does (shrink.py beside this): they
// have 16 rows of A of one job (tiles.py) in the place of 16 columns of the weight, only the rows of its tile, and the same norm. What they
// read is little beside the weight, so they cost next to nothing, and no launch of their own. A graph has blocks for more jobs than there
// are: these end at once, and are not in the way of others.
//
// Defined by who compiles this: WARPS, TILES (of eight rows), GROUPS (of sixteen columns), NORM (0: none; 1; 2: with a float32 weight), KIND
// (of activation; below 0: no gate), BIAS, ADD, ADAPTED (then there is no gate).

#include "warp.cuh"
#include "activation.cuh"
#include "few_rows.cuh"

constexpr int DEPTH = 4 / GROUPS;  // chunks of 32 of the inner dimension that are on their way
constexpr int AT_ONCE = GROUPS > 1 ? DEPTH : TILES >= DEPTH ? 1 : DEPTH / TILES;  // chunks whose rows are loaded together
constexpr int EACH = GATED ? 8 : 16;  // columns of the result that a group has: a gate's sixteen are eight, and what they are multiplied with
constexpr int COLUMNS = EACH * GROUPS;

// x [rows, inner], a row every x_row numbers; weight [outs, inner], with a gate [2 * outs, inner]; out and add [rows, outs].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) few_rows(
    const unsigned short* __restrict__ x, const unsigned short* __restrict__ weight, const unsigned short* __restrict__ bias,
    const void* __restrict__ norm, const unsigned short* add, unsigned short* out, u64 x_row, int rows, int inner, int outs,
    float epsilon, const Shrink shrink) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * COLUMNS;
  const int chunks = inner / 32;
  const bool shrinks = ADAPTED && first >= outs;
  const int unit = blockIdx.x - (outs + COLUMNS - 1) / COLUMNS;  // a slice of a job
  const s64* tokens = nullptr;  // of a job, and how many of its page's rows of A there are
  int ranks = 0;
  const unsigned short* mine[2 * GROUPS];
  if (shrinks) {
    const int index = unit / shrink.slices, part = unit % shrink.slices;
    if (index >= shrink.tiles[1]) return;
    const s64* job = shrink.jobs + 3 * index;
    ranks = shrink.used[job[0] * shrink.sites + shrink.site + part];
    if (ranks == 0) return;
    tokens = shrink.tokens + job[1], rows = (int)job[2];
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {  // one group is enough
      const int row = part * 16 + min(i % 2 * 8 + group, ranks - 1);
      mine[i] = shrink.data + job[0] * shrink.page_size + shrink.a + (u64)row * inner + quarter * 8;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
      const int row = GATED ? i % 2 * outs + min(first + i / 2 * 8 + group, outs - 1) : min(first + i * 8 + group, outs - 1);
      mine[i] = weight + (u64)row * inner + quarter * 8;
    }
  }
  Quad w[DEPTH][2 * GROUPS], scales[DEPTH];
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    const int chunk = warp + j * WARPS;
    if (chunk >= chunks) continue;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
      if (i < 2 || !shrinks) w[j][i] = load_constant(mine[i] + chunk * 32);
    }
    if (NORM == 1) scales[j] = load_constant((const unsigned short*)norm + chunk * 32 + quarter * 8);
  }
  wait_for_kernel_before();
  u32 theirs[TILES];  // of x: an address each would take twice the registers
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int row = min(tile * 8 + group, rows - 1);
    theirs[tile] = (shrinks ? (u32)tokens[row] : row) * (u32)x_row + quarter * 8;
  }
  float sums[TILES][GROUPS][4] = {}, squares[TILES] = {};
  for (int base = warp; base < chunks; base += DEPTH * WARPS) {
#pragma unroll
    for (int some = 0; some < DEPTH; some += AT_ONCE) {
      Quad given[AT_ONCE][TILES];  // loaded together: a wait for each would take longer than all the rest
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          if (base + (some + j) * WARPS < chunks) given[j][tile] = load(x + theirs[tile] + (base + (some + j) * WARPS) * 32);
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
#pragma unroll
          for (int g = 0; g < GROUPS; g++) {
            if (g > 0 && shrinks) break;
            multiply(sums[tile][g], w[j][2 * g].a, w[j][2 * g + 1].a, w[j][2 * g].b, w[j][2 * g + 1].b, q.a, q.b);
            multiply(sums[tile][g], w[j][2 * g].c, w[j][2 * g + 1].c, w[j][2 * g].d, w[j][2 * g + 1].d, q.c, q.d);
          }
        }
        const int next = chunk + DEPTH * WARPS;
        if (next >= chunks) continue;
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) {
          if (i < 2 || !shrinks) w[j][i] = load_constant(mine[i] + next * 32);
        }
        if (NORM == 1) scales[j] = load_constant((const unsigned short*)norm + next * 32 + quarter * 8);
      }
    }
  }
  // sums: of columns `group` and `group + 8` of sixteen, rows `2 * quarter` and the next. squares: of row `group`, a quarter of them.
  constexpr int PARTS = TILES * GROUPS * 128, ROWS = TILES * 8;
  __shared__ float parts[WARPS][PARTS], lengths[WARPS][ROWS];  // parts: [tile, group, half of sixteen columns, row, column]
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
      float* to = parts[warp] + (tile * 2 * GROUPS + i) * 64 + 16 * quarter + group;
      to[0] = sums[tile][i / 2][i % 2 * 2], to[8] = sums[tile][i / 2][i % 2 * 2 + 1];
    }
    if (NORM) {
      const float sum = sum_of_four(squares[tile]);
      if (quarter == 0) lengths[warp][tile * 8 + group] = sum;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < ROWS * COLUMNS; at += 32 * WARPS) {
    const int column = at % COLUMNS, row = at / COLUMNS, o = first + column;
    if (row >= rows || (shrinks ? column >= 16 : o >= outs)) continue;
    const float* of_first = parts[0] + ((row / 8 * GROUPS + column / EACH) * 2 + column % EACH / 8) * 64 + row % 8 * 8 + column % 8;
    const float factor = NORM ? rsqrtf(sum_of<WARPS>(lengths[0] + row, ROWS) / inner + epsilon) : 1.0f;
    float y = sum_of<WARPS>(of_first, PARTS) * factor;
    if (shrinks) {
      shrink.sums[((u64)unit * 16 + row) * 16 + column] = column < ranks ? y : 0.0f;
      continue;
    }
    finish(y, GATED ? sum_of<WARPS>(of_first + 64, PARTS) * factor : 0.0f, bias, add, out, row, o, outs);
  }
}
