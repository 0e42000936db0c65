// The product of a few rows with a large weight: what few_rows.cu beside this does, on a device that copies in bulk (Hopper and later).
//
// There a warp asks for weights and waits for them, and how much it can ask for is what its registers hold: enough for three quarters of what
// the fastest memory gives. Here one thread of a block asks for all of it, weights and rows, STAGES ahead, and the others find them in shared
// memory. The first weights are on their way long before the kernel before this one has ended, as two blocks stay on a multiprocessor.
//
// A stage has ALONG boxes of the inner dimension, of all columns of the block and of all rows: so a row is read once for 16 * GROUPS columns.
// A warp has one of these boxes and a share of the groups: a thread has 16 numbers of the inner dimension, which are its operands of four
// instructions as they come, of two columns and of each eight rows.
//
// What adapters add begins here, too: the last blocks of the grid have the 16 rows of A of one job, those that its page does not use too, in
// the place of columns of the weight. They multiply them with all rows, which costs no more, and write the sums of their job's tokens.
//
// Defined by who compiles this: ALONG and ACROSS (warps along the inner dimension, and across columns), GROUPS (of sixteen columns; with a
// gate, of eight and what they are multiplied with), STAGES, TILES, NORM, KIND, BIAS, ADD, ADAPTED.

#include "warp.cuh"
#include "bulk.cuh"
#include "activation.cuh"
#include "few_rows.cuh"

constexpr int WARPS = ALONG * ACROSS, THREADS = 32 * (WARPS + 1), EACH = (GROUPS + ACROSS - 1) / ACROSS;
constexpr int COLUMNS = 16 * GROUPS, OUTS = GATED ? COLUMNS / 2 : COLUMNS, ROWS = 8 * TILES, DEPTH = ALONG * BOX;
constexpr int OF_WEIGHT = COLUMNS * BOX_BYTES, OF_ROWS = ROWS * BOX_BYTES, STAGE = ALONG * (OF_WEIGHT + OF_ROWS);
constexpr int LINE = COLUMNS + 4;  // of sums in shared memory: neighbours are in other banks
static_assert(STAGES * STAGE >= ALONG * ROWS * LINE * 4, "the sums take the place of the stages");

// x [rows, inner], weight [outs, inner], with a gate [2 * outs, inner], in boxes of ROWS and of OUTS rows; a [pages, 16 * slices, inner] in
// those of 16. The rest is as in few_rows.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 2) few_rows_bulk(
    const __grid_constant__ Map x, const __grid_constant__ Map weight, const __grid_constant__ Map a, const unsigned short* __restrict__ bias,
    const void* __restrict__ norm, const unsigned short* add, unsigned short* out, int rows, int inner, int outs, float epsilon,
    const Shrink shrink) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * OUTS, stages = (inner + DEPTH - 1) / DEPTH;
  const bool shrinks = ADAPTED && first >= outs;
  const int unit = blockIdx.x - (outs + OUTS - 1) / OUTS;  // a slice of a job
  const s64* job = nullptr;
  int ranks = 0, part = 0;
  if (shrinks) {
    part = unit % shrink.slices;
    if (unit / shrink.slices >= shrink.tiles[1]) return;
    job = shrink.jobs + unit / shrink.slices * 3;
    ranks = shrink.used[job[0] * shrink.sites + shrink.site + part];
    if (ranks == 0) return;
  }
  char* memory = dynamic_memory();
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ float lengths[ALONG][ROWS];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) begin_barrier(full + i, 1), begin_barrier(empty + i, WARPS);
  }
  __syncthreads();

  float sums[EACH][TILES][4] = {}, squares[TILES] = {};
  const int along = warp % ALONG, across = warp / ALONG;
  if (warp == WARPS && lane == 0) {
    const auto fetch_weights = [&](int stage) {
      char* to = memory + stage % STAGES * STAGE;
      u64* barrier = full + stage % STAGES;
      arrive_expecting(barrier, shrinks ? ALONG * (16 * BOX_BYTES + OF_ROWS) : STAGE);
#pragma unroll
      for (int box = 0; box < ALONG; box++) {
        const int k = stage * DEPTH + box * BOX;
        if (shrinks) {
          fetch(to + box * OF_WEIGHT, &a, k, part * 16, (int)job[0], barrier);
          continue;
        }
        fetch(to + box * OF_WEIGHT, &weight, k, first, barrier);
        if (GATED) fetch(to + box * OF_WEIGHT + OF_WEIGHT / 2, &weight, k, outs + first, barrier);
      }
    };
    const auto fetch_rows = [&](int stage) {
      char* to = memory + stage % STAGES * STAGE + ALONG * OF_WEIGHT;
#pragma unroll
      for (int box = 0; box < ALONG; box++) fetch(to + box * OF_ROWS, &x, stage * DEPTH + box * BOX, 0, full + stage % STAGES);
    };
    for (int stage = 0; stage < min(STAGES, stages); stage++) fetch_weights(stage);
    wait_for_kernel_before();
    for (int stage = 0; stage < min(STAGES, stages); stage++) fetch_rows(stage);
    for (int stage = STAGES; stage < stages; stage++) {
      wait_for_phase(empty + stage % STAGES, stage / STAGES - 1);
      fetch_weights(stage), fetch_rows(stage);
    }
  } else if (warp < WARPS) {
    Quad scales[NORM ? 2 * NORM : 1] = {};  // of the next stage: the norm's weights for 16 numbers; what is beyond them is times zeros
    const auto load_scales = [&](int stage) {
      const int k = stage * DEPTH + along * BOX + quarter * 16;
#pragma unroll
      for (int i = 0; i < 2 * NORM; i++) {
        if (k + i * 8 / NORM < inner) scales[i] = load_common_constant((const char*)norm + k * 2 * NORM + i * 16);
      }
    };
    if (NORM) load_scales(0);
    wait_for_kernel_before();
    for (int stage = 0; stage < stages; stage++) {
      float factors[16];
      if (NORM == 1) spread(scales[0], factors), spread(scales[1], factors + 8);
      if (NORM == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          factors[4 * i] = __uint_as_float(scales[i].a), factors[4 * i + 1] = __uint_as_float(scales[i].b);
          factors[4 * i + 2] = __uint_as_float(scales[i].c), factors[4 * i + 3] = __uint_as_float(scales[i].d);
        }
      }
      if (NORM && stage + 1 < stages) load_scales(stage + 1);
      wait_for_phase(full + stage % STAGES, stage / STAGES);
      const char* weights = memory + stage % STAGES * STAGE + along * OF_WEIGHT;
      const char* given = memory + stage % STAGES * STAGE + ALONG * OF_WEIGHT + along * OF_ROWS;
      Quad q[TILES][2];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          q[tile][i] = load_shared(given + (tile * 8 + group) * BOX_BYTES + ((2 * quarter + i) ^ group) * 16);
          if (NORM) squares[tile] += scale(q[tile][i], factors + 8 * i);
        }
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const int g = across + e * ACROSS;
        if (g >= GROUPS || (shrinks && g > 0)) break;
        const char* upper = weights + (g * OUTS / GROUPS + group) * BOX_BYTES;  // eight columns; and eight more, or what a gate multiplies
        const char* lower = upper + (GATED ? OF_WEIGHT / 2 : 8 * BOX_BYTES);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int at = ((2 * quarter + i) ^ group) * 16;
          const Quad u = load_shared(upper + at), l = load_shared(lower + at);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            multiply(sums[e][tile], u.a, l.a, u.b, l.b, q[tile][i].a, q[tile][i].b);
            multiply(sums[e][tile], u.c, l.c, u.d, l.d, q[tile][i].c, q[tile][i].d);
          }
        }
      }
      meet_warp();
      if (lane == 0) arrive(empty + stage % STAGES);
    }
  }
  __syncthreads();  // all stages were read

  float* parts = (float*)memory;  // [along, row, column]: with a gate, eight columns stand before the eight that they multiply
  if (warp < WARPS) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        const int g = across + e * ACROSS;
        if (g >= GROUPS) break;
        float* to = parts + (along * ROWS + tile * 8 + 2 * quarter) * LINE + g * 16 + group;
        to[0] = sums[e][tile][0], to[LINE] = sums[e][tile][1];
        to[8] = sums[e][tile][2], to[LINE + 8] = sums[e][tile][3];
      }
      if (NORM) {
        const float sum = sum_of_four(squares[tile]);
        if (quarter == 0 && across == 0) lengths[along][tile * 8 + group] = sum;
      }
    }
  }
  __syncthreads();
  const auto factor_of = [&](int row) { return NORM ? rsqrtf(sum_of<ALONG>(lengths[0] + row, ROWS) / inner + epsilon) : 1.0f; };
  if (shrinks) {
    for (int at = threadIdx.x; at < (int)job[2] * 16; at += THREADS) {
      const int column = at % 16, row = (int)shrink.tokens[job[1] + at / 16];
      const float y = sum_of<ALONG>(parts + row * LINE + column, ROWS * LINE) * factor_of(row);
      shrink.sums[(u64)unit * 256 + at] = column < ranks ? y : 0.0f;
    }
    return;
  }
  for (int at = threadIdx.x; at < rows * OUTS; at += THREADS) {
    const int column = at % OUTS, row = at / OUTS, o = first + column;
    if (o >= outs) continue;
    const float* of_first = parts + row * LINE + (GATED ? column / 8 * 16 + column % 8 : column);
    const float factor = factor_of(row);
    const float y = sum_of<ALONG>(of_first, ROWS * LINE) * factor, up = GATED ? sum_of<ALONG>(of_first + 8, ROWS * LINE) * factor : 0.0f;
    finish(y, up, bias, add, out, row, o, outs);
  }
}
