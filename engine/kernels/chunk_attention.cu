// Attention of prefill chunks: what attend_chunks in paged_attention.py beside this does, as fast as tensor cores multiply (Hopper).
//
// A piece of work is a tile of 128 rows: some tokens of a chunk, with the query heads that share a KV head. Two warpgroups have 64 rows each.
// Another warp asks for the queries, and for tiles of KEYS keys and values, STAGES ahead, box by box out of the blocks where they lie. A block
// of threads stays for many pieces, and asks for the next one's while it ends one.
//
// Keys are gone through from the last to the first, so that only the first tiles are masked. While tensor cores multiply a tile's weights with
// its values, the scores of the next tile, which they have multiplied before, are weighed: exponentials take about as long as products.
//
// Numbers are bfloat16, sums float32. What was never written cannot matter: scores of such keys are masked, and such values made zero.
//
// Defined by who compiles this: KEYS, STAGES, HEADS, KV_HEADS, SIZE (keys in a block of the pool, a multiple of 16), WINDOW.

#include "warp.cuh"
#include "bulk.cuh"
#include "warpgroup.cuh"

constexpr int DIM = 128, UNIT = 16;  // of a head; keys of a box
constexpr int WARPGROUPS = 2, THREADS = 128 * (WARPGROUPS + 1), ROWS = TILE_ROWS * WARPGROUPS;
constexpr int SHARED = HEADS / KV_HEADS, QUERIES = ROWS / SHARED;  // heads and tokens of a tile
constexpr int HALVES = DIM / BOX, OF_QUERIES = ROWS * BOX_BYTES, OF_KEYS = KEYS * BOX_BYTES;  // bytes of a half
constexpr int AHEAD = 2, STAGE = 2 * HALVES * OF_KEYS;  // pieces whose queries are there; keys, and values behind them
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(KEYS == 128 && SIZE % UNIT == 0 && SHARED <= ROWS, "no such shapes");

struct Piece { int slot, start, first, count, kv_head; };

// q [tokens, HEADS, DIM] in boxes of QUERIES tokens and SHARED heads; keys and values as matrices of rows of DIM, in boxes of UNIT rows; out
// [tokens, HEADS, DIM]. Of each tile: see Chunks in paged_attention.py; the longest come first.
extern "C" __global__ void __launch_bounds__(THREADS, 1) chunk_attention(
    const __grid_constant__ Map q, const __grid_constant__ Map keys, const __grid_constant__ Map values, unsigned short* out,
    const s64* slots, const s64* starts, const s64* firsts, const s64* counts, const int* table, int columns, int tiles, int window,
    float scaling) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  char *memory = dynamic_memory(), *ring = memory + AHEAD * HALVES * OF_QUERIES;
  u64* asked = (u64*)(ring + STAGES * STAGE);  // barriers: of queries, of keys, and of values
  u64 *answered = asked + AHEAD, *full_keys = answered + AHEAD, *empty_keys = full_keys + STAGES;
  u64 *full_values = empty_keys + STAGES, *empty_values = full_values + STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < AHEAD; i++) begin_barrier(asked + i, 1), begin_barrier(answered + i, 4 * WARPGROUPS);
    for (int i = 0; i < STAGES; i++) {
      begin_barrier(full_keys + i, 1), begin_barrier(empty_keys + i, 4 * WARPGROUPS);
      begin_barrier(full_values + i, 1), begin_barrier(empty_values + i, 4 * WARPGROUPS);
    }
  }
  __syncthreads();
  wait_for_kernel_before();

  // Each block has long pieces and short ones: in every other round the order is turned. Where there is none, it has no tokens.
  const auto find_piece = [&](int round) {
    const int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x), tile = min(index / KV_HEADS, tiles - 1);
    return Piece{(int)slots[tile], (int)starts[tile], (int)firsts[tile], index < tiles * KV_HEADS ? (int)counts[tile] : 0, index % KV_HEADS};
  };
  const auto low_of = [&](const Piece& piece) { return WINDOW ? max(piece.start - window + 1, 0) / KEYS * KEYS : 0; };
  const int rounds = (tiles * KV_HEADS + gridDim.x - 1) / gridDim.x;
  int turn = 0, count = 0;  // tiles of keys, and pieces, that this block has had

  if (warpgroup == WARPGROUPS) {
    give_registers<40>();
    Piece next = find_piece(0), piece = next;
    for (int round = 0; warp == 0 && round < rounds; round++) {
      piece = next, next = find_piece(round + 1);  // which takes its time
      if (piece.count == 0) continue;
      const int end = piece.start + piece.count, low = low_of(piece);
      char* to = memory + count % AHEAD * HALVES * OF_QUERIES;
      if (count >= AHEAD) wait_for_phase(answered + count % AHEAD, count / AHEAD - 1);
      if (lane == 0) {
        arrive_expecting(asked + count % AHEAD, HALVES * QUERIES * SHARED * BOX_BYTES);
#pragma unroll
        for (int h = 0; h < HALVES; h++) fetch(to + h * OF_QUERIES, &q, h * BOX, piece.kv_head * SHARED, piece.first, asked + count % AHEAD);
      }
      count++;
      const int* entries = table + (s64)piece.slot * columns;
      for (int at = (end - 1) / KEYS * KEYS; at >= low; at -= KEYS, turn++) {
        const int units = min(KEYS, end - at + UNIT - 1) / UNIT, key = at + lane * UNIT;
        const int line = lane < units ? (entries[key / SIZE] * KV_HEADS + piece.kv_head) * SIZE + key % SIZE : 0;
        char* there = ring + turn % STAGES * STAGE + lane * UNIT * BOX_BYTES;
        const auto fetch_units = [&](const Map* map, char* to, u64* full, u64* empty) {
          if (turn >= STAGES) wait_for_phase(empty, turn / STAGES - 1);
          if (lane == 0) arrive_expecting(full, units * HALVES * UNIT * BOX_BYTES);
          meet_warp();
          if (lane >= units) return;
#pragma unroll
          for (int h = 0; h < HALVES; h++) fetch(to + h * OF_KEYS, map, h * BOX, line, full);
        };
        fetch_units(&keys, there, full_keys + turn % STAGES, empty_keys + turn % STAGES);
        fetch_units(&values, there + HALVES * OF_KEYS, full_values + turn % STAGES, empty_values + turn % STAGES);
      }
    }
  } else {
    take_registers<232>();
    float scores[SUMS / 2], sums[SUMS / 2], bests[2], totals[2], shrinks[2];  // of two rows: this one, and the one eight further
    u32 weights[SUMS / 4];
    int positions[2];
    const float factor = scaling * LOG2_E;
    const char* queries;
    Piece next = find_piece(0), piece = next;

    const auto multiply_keys = [&](int turn) {  // to scores
      wait_for_phase(full_keys + turn % STAGES, turn / STAGES);
      const char* from = ring + turn % STAGES * STAGE;
      begin_products();
#pragma unroll
      for (int i = 0; i < DIM / 16; i++) {
        multiply_tiles(scores, queries + i / 4 * OF_QUERIES + i % 4 * 32, from + i / 4 * OF_KEYS + i % 4 * 32, i > 0);
      }
      end_products();
    };
    const auto multiply_values = [&](int turn, int unwritten, bool add) {  // with weights, to sums; so many of the last values are made zero
      wait_for_phase(full_values + turn % STAGES, turn / STAGES);
      char* from = ring + turn % STAGES * STAGE + HALVES * OF_KEYS;
      if (unwritten > 0) {  // both warpgroups do it, or one would have to wait for the other
        const int key = threadIdx.x % 128;
        for (int i = 0; i < HALVES * BOX_BYTES / 16 && key >= KEYS - unwritten; i++) {
          store_shared(from + i / 8 * OF_KEYS + key * BOX_BYTES + i % 8 * 16, {});
        }
        show_to_copies();
        meet_warpgroup(warpgroup);
      }
      begin_products();
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++) multiply_turned(sums, weights + 4 * i, from + i * 16 * BOX_BYTES, OF_KEYS, add || i > 0);
      end_products();
    };
    const auto release = [&](u64* barrier) {
      if (lane == 0) arrive(barrier);
    };
    const auto weigh = [&](int at) {  // scores of the keys from `at` on become weights of their rows, those before shrink
      if (at + KEYS > piece.start + 1 || (WINDOW && at < piece.start + piece.count - window)) {
#pragma unroll
        for (int i = 0; i < SUMS / 2; i++) {
          const int key = at + i / 4 * 8 + quarter * 2 + i % 2, position = positions[i % 4 / 2];
          if (key > position || (WINDOW && key <= position - window)) scores[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int row = 0; row < 2; row++) {
        float best = bests[row];
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) best = max(best, scores[i / 2 * 4 + row * 2 + i % 2]);
        best = max_of_four(best);
        const float base = best == -INFINITY ? 0.0f : best * factor;
        shrinks[row] = power_of_two(bests[row] * factor - base), bests[row] = best;
        float total = totals[row] * shrinks[row];
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) {
          float& x = scores[i / 2 * 4 + row * 2 + i % 2];
          x = power_of_two(x * factor - base), total += x;
        }
        totals[row] = total;
      }
    };
    const auto keep_weights = [&] {
#pragma unroll
      for (int i = 0; i < SUMS / 4; i++) weights[i] = both(scores[2 * i], scores[2 * i + 1]);
    };

    for (int round = 0; round < rounds; round++) {
      piece = next, next = find_piece(round + 1);
      if (piece.count == 0) continue;
      char* given = memory + count % AHEAD * HALVES * OF_QUERIES + warpgroup * TILE_ROWS * BOX_BYTES;
      queries = given;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        positions[row] = piece.start + (warpgroup * TILE_ROWS + warp * 16 + row * 8 + group) / SHARED;
        bests[row] = -INFINITY, totals[row] = 0.0f;
      }
      wait_for_phase(asked + count % AHEAD, count / AHEAD);
      const int end = piece.start + piece.count, low = low_of(piece);
      int at = (end - 1) / KEYS * KEYS, unwritten = at + KEYS - end;
      multiply_keys(turn);
      wait_for_products<0>(scores);
      release(empty_keys + turn % STAGES);
      weigh(at), keep_weights();
      bool begun = false;
      for (; at > low; turn++) {
        multiply_keys(turn + 1);
        multiply_values(turn, unwritten, begun);
        wait_for_products<1>(scores);
        release(empty_keys + (turn + 1) % STAGES);
        at -= KEYS, unwritten = 0, begun = true;
        weigh(at);
        wait_for_products<0>(sums);
        release(empty_values + turn % STAGES);
        if (any_of_warp(shrinks[0] < 1.0f || shrinks[1] < 1.0f)) {
#pragma unroll
          for (int i = 0; i < SUMS / 2; i++) sums[i] *= shrinks[i % 4 / 2];
        }
        keep_weights();
      }
      multiply_values(turn, unwritten, begun);
      wait_for_products<0>(sums);
      release(empty_values + turn % STAGES);
      turn++;

      // The queries, which nobody reads any more, make room for what is written: rows of whole heads lie together in memory.
      meet_warpgroup(warpgroup);
#pragma unroll
      for (int row = 0; row < 2; row++) totals[row] = __fdividef(1.0f, sum_of_four(totals[row]));
      const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
      for (int j = 0; j < DIM / 8; j += 2) {
        u32 two[4];
#pragma unroll
        for (int i = 0; i < 4; i++) two[i] = both(sums[j * 4 + 2 * i] * totals[i % 2], sums[j * 4 + 2 * i + 1] * totals[i % 2]);
        store_matrices(given + j / 8 * OF_QUERIES + row * BOX_BYTES + ((j + lane / 16) % 8 ^ row % 8) * 16, two[0], two[1], two[2], two[3]);
      }
      meet_warp();
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int chunk = lane % 16, mine = warp * 16 + 2 * i + lane / 16, of_tile = warpgroup * TILE_ROWS + mine, token = of_tile / SHARED;
        if (token >= piece.count) continue;
        const Quad words = load_shared(given + chunk / 8 * OF_QUERIES + mine * BOX_BYTES + (chunk % 8 ^ mine % 8) * 16);
        store(out + ((s64)(piece.first + token) * HEADS + piece.kv_head * SHARED + of_tile % SHARED) * DIM + chunk * 8, words);
      }
      show_to_copies();
      meet_warp();
      release(answered + count % AHEAD);
      count++;
    }
  }
}
