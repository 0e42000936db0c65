// The product of many rows with a weight, and an activation and gate after it in the same launch: as fast as tensor cores multiply (Hopper).
//
//     out[r, o] = activate(sum over k of x[r, k] * weight[o, k]) * (sum over k of x[r, k] * weight[outs + o, k])
//
// A block has a tile of 128 rows of x and 256 of the weight, half of which are the gate's. One thread asks for boxes of both, STAGES ahead;
// two warpgroups have 64 of the rows each, and multiply what has come. A gate's columns and those that it multiplies are in the registers of
// one thread: so what memory sees of the product is half of it, and no other kernel reads it again.
//
// A block stays for many tiles. The copies of a tile's first stages run while the tile before it is being written; and the second warpgroup is
// BEHIND stages behind the first, so that one multiplies while the other activates and writes. CLUSTER blocks have
// the same columns and neighbouring rows: each asks for its share of the weight, which goes to all of them. Tiles are taken in an order in
// which those at work together have BAND clusters' rows and some columns in common: then most of what they ask for is in the second-level cache.
//
// Numbers are bfloat16, sums float32.
//
// Defined by who compiles this: STAGES, BEHIND, CLUSTER, BAND, KIND (of activation; below 0: no gate, and 256 columns).

#include "warp.cuh"
#include "bulk.cuh"
#include "warpgroup.cuh"
#include "activation.cuh"

constexpr int WARPGROUPS = 2, THREADS = 128 * (WARPGROUPS + 1);
constexpr int ROWS = TILE_ROWS * WARPGROUPS, OUTS = GATED ? TILE_COLUMNS / 2 : TILE_COLUMNS;
constexpr int OF_ROWS = ROWS * BOX_BYTES, OF_WEIGHT = TILE_COLUMNS * BOX_BYTES, STAGE = OF_ROWS + OF_WEIGHT;
constexpr int AT_ONCE = 128, STAGED = TILE_ROWS * AT_ONCE * 2;  // columns that a warpgroup writes at once, and their bytes

struct Tile { int row, column; };

// The first row of a cluster's, and the first column.
__device__ inline Tile tile_at(int index, int bands_rows, int columns) {
  const int first = index / (BAND * columns) * BAND, size = min(BAND, bands_rows - first), rest = index % (BAND * columns);
  return {(first + rest % size) * ROWS * CLUSTER, rest / size * OUTS};
}

// x [rows, inner] in boxes of ROWS rows; weight [outs, inner], with a gate [2 * outs, inner], in those of TILE_COLUMNS / 2 / CLUSTER;
// out [rows, outs] in those of TILE_ROWS.
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) many_rows(
    const __grid_constant__ Map x, const __grid_constant__ Map weight, const __grid_constant__ Map out, int rows, int inner, int outs) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int rank = CLUSTER > 1 ? rank_in_cluster() : 0, clusters = gridDim.x / CLUSTER;
  const int row_tiles = (rows + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), column_tiles = (outs + OUTS - 1) / OUTS;
  const int tiles = row_tiles * column_tiles, stages = (inner + BOX - 1) / BOX;
  char* memory = dynamic_memory();
  u64 *full = (u64*)(memory + STAGES * STAGE + WARPGROUPS * STAGED), *empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) begin_barrier(full + i, 1), begin_barrier(empty + i, 4 * WARPGROUPS * CLUSTER);
  }
  if (CLUSTER > 1) meet_cluster(); else __syncthreads();
  wait_for_kernel_before();

  if (warpgroup == WARPGROUPS) {
    give_registers<40>();
    if (threadIdx.x == 128 * WARPGROUPS) {
      int turn = 0;
      for (int index = blockIdx.x / CLUSTER; index < tiles; index += clusters) {
        const Tile tile = tile_at(index, row_tiles, column_tiles);
        for (int stage = 0; stage < stages; stage++, turn++) {
          char* to = memory + turn % STAGES * STAGE;
          u64* barrier = full + turn % STAGES;
          if (turn >= STAGES) wait_for_phase(empty + turn % STAGES, turn / STAGES - 1);
          arrive_expecting(barrier, STAGE);
          fetch(to, &x, stage * BOX, tile.row + rank * ROWS, barrier);
          constexpr int PART = TILE_COLUMNS / 2 / CLUSTER;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int from = tile.column + half * (GATED ? outs : TILE_COLUMNS / 2) + rank * PART;
            char* there = to + OF_ROWS + (half * TILE_COLUMNS / 2 + rank * PART) * BOX_BYTES;
            if (CLUSTER > 1) fetch_for(CLUSTER, there, &weight, stage * BOX, from, barrier);
            else fetch(there, &weight, stage * BOX, from, barrier);
          }
        }
      }
    }
  } else {
    take_registers<232>();
    float sums[SUMS];
    char* staged = memory + STAGES * STAGE + warpgroup * STAGED;
    const bool leads = threadIdx.x % 128 == 0;
    const auto release = [&](int turn) {  // to all who have copied into it
      if (lane < CLUSTER) {
        if (CLUSTER > 1) arrive_at(empty + turn % STAGES, lane); else arrive(empty + turn % STAGES);
      }
    };
    const bool follows = BEHIND > 0 && stages >= STAGES;  // with fewer the first could go ahead again before the second has followed
    int turn = 0;
    for (int index = blockIdx.x / CLUSTER; index < tiles; index += clusters) {
      if (follows && warpgroup == 1) wait_behind();
      for (int stage = 0; stage < stages; stage++, turn++) {
        wait_for_phase(full + turn % STAGES, turn / STAGES);
        const char* given = memory + turn % STAGES * STAGE + warpgroup * TILE_ROWS * BOX_BYTES;
        const char* weights = memory + turn % STAGES * STAGE + OF_ROWS;
        begin_products();
#pragma unroll
        for (int i = 0; i < BOX / 16; i++) multiply_tiles(sums, given + 32 * i, weights + 32 * i, stage > 0 || i > 0);
        end_products();
        wait_for_products<1>();
        if (stage > 0) release(turn - 1);
        if (follows && warpgroup == 0 && stage == BEHIND - 1) go_ahead();
      }
      wait_for_products<0>(sums);
      release(turn - 1);

      const Tile tile = tile_at(index, row_tiles, column_tiles);
#pragma unroll
      for (int half = 0; half < OUTS / AT_ONCE; half++) {
        if (leads) wait_for_stores();
        meet_warpgroup(warpgroup);
        // A box has eight times eight columns. Of the four matrices that a warp stores, the second and fourth have eight rows further.
        const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int j = 0; j < AT_ONCE / 8; j += 2) {
          u32 two[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = half * AT_ONCE / 2 + j * 4 + 2 * i;
            float y = sums[at], next = sums[at + 1];
            if (GATED) {
              activate_two(y, next);
              y *= sums[SUMS / 2 + at], next *= sums[SUMS / 2 + at + 1];
            }
            two[i] = both(y, next);
          }
          char* to = staged + j / 8 * TILE_ROWS * BOX_BYTES + row * BOX_BYTES + ((j + lane / 16) % 8 ^ row % 8) * 16;
          store_matrices(to, two[0], two[1], two[2], two[3]);
        }
        show_to_copies();
        meet_warpgroup(warpgroup);
        if (leads) {
#pragma unroll
          for (int box = 0; box < AT_ONCE / BOX; box++) {
            store(&out, staged + box * TILE_ROWS * BOX_BYTES, tile.column + half * AT_ONCE + box * BOX,
                  tile.row + rank * ROWS + warpgroup * TILE_ROWS);
          }
          end_stores();
        }
      }
    }
    if (leads) wait_for_stores();
  }
  if (CLUSTER > 1) meet_cluster();  // nobody goes whose memory others may still write to, or whose barriers they arrive at
}
