// Attention of decodes, a block for one KV head of a row: what decode_attention.py beside this does, as near to the speed at which keys and
// values can be read as we know how. Where rows are few the keys of each are split among several blocks, and the one that ends last merges
// them.
//
// The warps of a block share its keys, a unit of sixteen at a time for each, and their sums meet in shared memory. As in few_rows.cu, which of
// the indices is which inside a tensor core's instruction does not matter as long as both operands agree: so a thread reads keys and values
// 16 bytes at a time. There are two ways:
//
// - From memory to where they are multiplied, without a detour through shared memory. Two blocks stay on a multiprocessor, and each warp has
//   its next keys on their way while it weighs the values of these; so one block's beginning, which is all waiting, costs nothing.
// - In bulk, where rows are many: one more warp asks for all of it, RING units ahead, and the copy engine puts them into shared memory, so that
//   two blocks have 192 KiB on their way, whatever their other warps do. A warp has the same places of the ring each time: who does not see all
//   phases of a barrier cannot tell them apart.
//
//     scores   queries [16 heads, dims] times keys [dims, 8]: a thread has 8 dims of one key; of 16 heads at most 8 are there
//     sums     values [16 dims, 16 keys] times weights [16 keys, 8 heads]: a thread has 8 dims of four keys, two of which make a pair for
//              each dim; its weights are what it has of the scores
//
// Heads are normed and turned here, and the newest key and value, which are in the fused product with the queries, go to the pool; all
// others are of earlier steps, so the first are on their way before the product is done. Numbers are bfloat16.
//
// Defined by who compiles this: WARPS (that attend), RING (0: not in bulk), HEADS, KV_HEADS, DIM (64 or 128), SIZE (keys in a block of the
// pool, a multiple of 16), PAIRS (that are turned), NORM (of heads: 0, or 1), WINDOW.

#include "warp.cuh"
#include "bulk.cuh"

constexpr int UNIT = 16;  // keys
constexpr int SHARED = HEADS / KV_HEADS, MOST = 8;  // heads of a block, and of an instruction
static_assert(SHARED <= MOST && SIZE % UNIT == 0 && DIM % BOX == 0 && 2 * PAIRS <= DIM && RING % WARPS == 0, "no such shapes");
constexpr bool BULK = RING > 0;
constexpr int THREADS = 32 * (BULK ? WARPS + 1 : WARPS), PARTS = DIM / 32, CHUNKS = DIM / BOX;
constexpr int OF_BOX = UNIT * BOX_BYTES, OF_KEYS = CHUNKS * OF_BOX;  // bytes; those of a unit's values come after those of its keys
constexpr int LINE = DIM + (BULK ? 8 : 32);  // of a head in shared memory: neighbours are in other banks
constexpr float LOG2_E = 1.4426950408889634f, NOTHING = -3e38f;  // of scores: below any

__device__ inline u32 word(const Quad& q, int i) { return i == 0 ? q.a : i == 1 ? q.b : i == 2 ? q.c : q.d; }

// A head of the product, normed and turned, by one warp: numbers lane, lane + 32 and so on. `shared` has room for it.
__device__ inline void turn(const unsigned short* head, const unsigned short* weight, const float* cos, const float* sin, float epsilon,
                            unsigned short* shared) {
  const int lane = threadIdx.x % 32;
  float x[PARTS], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PARTS; i++) x[i] = number(head + lane + 32 * i), squares += x[i] * x[i];
  if (NORM) {
    const float scale = rsqrtf(sum_of_warp(squares) / DIM + epsilon);
#pragma unroll
    for (int i = 0; i < PARTS; i++) x[i] = x[i] * scale * number(weight + lane + 32 * i);
  }
#pragma unroll
  for (int i = 0; i < PARTS; i++) shared[lane + 32 * i] = (unsigned short)both(x[i], x[i]), x[i] = number(shared + lane + 32 * i);
  meet_warp();
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int d = lane + 32 * i;
    if (d >= 2 * PAIRS) continue;
    const float other = number(shared + (d < PAIRS ? d + PAIRS : d - PAIRS));
    x[i] = x[i] * cos[d % PAIRS] + (d < PAIRS ? -other : other) * sin[d % PAIRS];
  }
  meet_warp();
#pragma unroll
  for (int i = 0; i < PARTS; i++) shared[lane + 32 * i] = (unsigned short)both(x[i], x[i]);
}

// qkv [rows, HEADS + 2 * KV_HEADS, DIM], a row every qkv_row numbers; keys and values [blocks, KV_HEADS, SIZE, DIM], and in bulk as matrices
// of as many rows of DIM, in boxes of UNIT rows; out [rows, HEADS, DIM].
// A row has up to `splits` blocks for each KV head, and one more only where those before have `least` units of keys each; what they leave for
// the last of them is in `parts` [rows, HEADS, splits, DIM + 2], and `tickets` [rows, KV_HEADS] are zero before and after. The rest is as in
// decode_attention.py.
extern "C" __global__ void __launch_bounds__(THREADS, 2) row_attention(
    const __grid_constant__ Map key_boxes, const __grid_constant__ Map value_boxes, const unsigned short* qkv, unsigned short* keys,
    unsigned short* values, unsigned short* out, const s64* slots, const s64* starts, const s64* places, const int* table, const s64* count,
    const unsigned short* weights, const float* cos, const float* sin, float* parts, u32* tickets, u64 qkv_row, int columns, int window,
    int splits, int least, float scaling, float epsilon) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int kv_head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS % splits, row = blockIdx.x / KV_HEADS / splits;
  const bool there = row < count[0];
  const int high = there ? (int)starts[row] : 0, low = WINDOW ? max(high - window + 1, 0) : 0;
  const int* entries = table + slots[row] * columns;
  const int first = low / UNIT, all = (high + UNIT - 1) / UNIT - first;
  const int blocks = min(splits, max(1, (all + least - 1) / least)), share = (all + blocks - 1) / blocks;  // with work, and for each
  const int begin = first + split * share, units = min(first + all, begin + share);
  if (split >= blocks) return;  // makes room for the next kernel's first blocks
  __shared__ __align__(16) unsigned short queries[MOST * LINE], newest_key[DIM], newest_value[DIM];
  __shared__ float bests[WARPS + 1][MOST], totals[WARPS + 1][MOST], own_sums[BULK ? 1 : WARPS * SHARED * DIM];
  __shared__ u64 full[BULK ? RING : 1], empty[BULK ? RING : 1];
  char* ring = BULK ? dynamic_memory() : nullptr;
  float* sums = BULK ? (float*)ring : own_sums;  // [warp, head, dim]

  Quad k[2][PARTS], v[4][CHUNKS];
  const auto line_of = [&](int unit, int block) { return (((s64)block * KV_HEADS + kv_head) * SIZE + unit * UNIT % SIZE) * DIM; };
  const auto load_keys = [&](int unit, int block) {
    const unsigned short* from = keys + line_of(unit, block) + group * DIM + quarter * 8;
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
      for (int i = 0; i < PARTS; i++) k[tile][i] = load_where(from + tile * 8 * DIM + i * 32, unit * UNIT + tile * 8 + group < high);
  };
  const auto load_values = [&](int unit, int block) {  // two pairs of keys: of the first eight, and of the others
    const unsigned short* from = values + line_of(unit, block) + 2 * quarter * DIM + group * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = i / 2 * 8 + i % 2;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) v[i][c] = load_where(from + key * DIM + c * 64, unit * UNIT + 2 * quarter + key < high);
    }
  };
  const auto block_of = [&](int unit) { return unit < units ? entries[unit * UNIT / SIZE] : 0; };

  // By a whole warp, units `from` to `to` counted from the first of this block: entries of the table are read many at once.
  const auto fetch_units = [&](int from, int to) {
    for (int some = from; some < to; some += 32) {
      const int mine = block_of(begin + some + lane);
      for (int i = some; i < min(some + 32, to); i++) {
        const int line = (from_lane(mine, i - some) * KV_HEADS + kv_head) * SIZE + (begin + i) * UNIT % SIZE;
        if (lane != 0) continue;
        u64* barrier = full + i % RING;
        char* place = ring + i % RING * 2 * OF_KEYS;
        if (i >= RING) wait_for_phase(empty + i % RING, i / RING - 1);
        arrive_expecting(barrier, 2 * OF_KEYS);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) fetch(place + c * OF_BOX, &key_boxes, c * BOX, line, barrier);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) fetch(place + OF_KEYS + c * OF_BOX, &value_boxes, c * BOX, line, barrier);
      }
    }
  };

  int unit = begin + warp, next_block = 0;
  if (!BULK) {
    next_block = block_of(unit + WARPS);
    const int block = block_of(unit);
    if (unit < units) load_keys(unit, block), load_values(unit, block);
  } else if (warp == WARPS) {
    if (lane == 0) {
      for (int i = 0; i < RING; i++) begin_barrier(full + i, 1), begin_barrier(empty + i, 1);
    }
    fetch_units(0, min(RING, units - begin));
  }
  for (int at = threadIdx.x; at < (MOST - SHARED) * LINE; at += THREADS) queries[SHARED * LINE + at] = 0;
  wait_for_kernel_before();
  if (!there) return;

  // The newest key and value are the first block's.
  for (int one = warp; warp < WARPS && one < (split == 0 ? SHARED + 2 : SHARED); one += WARPS) {
    const unsigned short* product = qkv + row * qkv_row;
    const s64 place = places[row];
    const s64 newest = ((place / SIZE * KV_HEADS + kv_head) * SIZE + place % SIZE) * DIM;
    const s64 angle = (s64)high * PAIRS;
    if (one < SHARED) {
      const int head = kv_head * SHARED + one;
      turn(product + head * DIM, weights + head * DIM, cos + angle, sin + angle, epsilon, queries + one * LINE);
    } else if (one == SHARED) {
      const int head = HEADS + kv_head;
      turn(product + head * DIM, weights + head * DIM, cos + angle, sin + angle, epsilon, newest_key);
      meet_warp();
      for (int d = lane; d < DIM && place >= 0; d += 32) keys[newest + d] = newest_key[d];
    } else {
      const unsigned short* value = product + (HEADS + KV_HEADS + kv_head) * DIM;
      for (int d = lane; d < DIM; d += 32) {
        newest_value[d] = value[d];
        if (place >= 0) values[newest + d] = value[d];
      }
    }
  }
  __syncthreads();

  const float factor = scaling * LOG2_E;
  float best = NOTHING, total = 0.0f, sum[8][4] = {};  // best, total: of head `group`; total: of this thread's keys
  if (BULK && warp == WARPS) fetch_units(RING, units - begin), unit = units;
  while (unit < units) {
    const int after = unit + WARPS, block = next_block, place = BULK ? (unit - begin) % RING : 0;
    const char* boxes = ring + place * 2 * OF_KEYS;
    if (BULK) wait_for_phase(full + place, (unit - begin) / RING);
    else next_block = block_of(after + WARPS);
    float scores[2][4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int eighth = BULK ? i % 2 + 2 * quarter : quarter + i % 2 * 4;  // of 64 dims
      const Quad q = load_shared(queries + group * LINE + i / 2 * BOX + eighth * 8);
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        if (BULK) k[tile][i] = load_shared(boxes + i / 2 * OF_BOX + (tile * 8 + group) * BOX_BYTES + (eighth ^ group) * 16);
        multiply(scores[tile], q.a, 0, q.b, 0, k[tile][i].a, k[tile][i].b);
        multiply(scores[tile], q.c, 0, q.d, 0, k[tile][i].c, k[tile][i].d);
      }
    }
    if (BULK) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = 2 * quarter + i / 2 * 8 + i % 2;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          v[i][c] = load_shared(boxes + OF_KEYS + c * OF_BOX + key * BOX_BYTES + (group ^ key % 8) * 16);
          if (unit * UNIT + key >= high) v[i][c] = {0, 0, 0, 0};  // what nobody wrote may be no number at all
        }
      }
      meet_warp();
      if (lane == 0) arrive(empty + place);
    } else if (after < units) {
      load_keys(after, block);
    }
    float top = NOTHING;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = unit * UNIT + i / 2 * 8 + 2 * quarter + i % 2;
      float& score = scores[i / 2][i % 2];
      score = key < high && key >= low ? score * factor : NOTHING;
      top = fmaxf(top, score);
    }
    const float higher = fmaxf(best, max_of_four(top)), base = higher == NOTHING ? 0.0f : higher;
    const float shrink = exp2f(best - base);
    best = higher, total *= shrink;
#pragma unroll
    for (int i = 0; i < 4; i++) total += scores[i / 2][i % 2] = exp2f(scores[i / 2][i % 2] - base);
    if (any_of_warp(shrink != 1.0f)) {  // sums are of heads 2 * quarter and the next
      const float one = from_lane(shrink, 8 * quarter), other = from_lane(shrink, 8 * quarter + 4);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i][0] *= one, sum[i][1] *= other, sum[i][2] *= one, sum[i][3] *= other;
    }
    const u32 of_first = both(scores[0][0], scores[0][1]), of_second = both(scores[1][0], scores[1][1]);
#pragma unroll
    for (int i = 0; i < 8; i++) {  // dims 8 * group + i, and 64 more than that
      const auto pair = [&](int key, int c) { return c < CHUNKS ? pick_half(word(v[key][c], i / 2), word(v[key + 1][c], i / 2), i % 2) : 0; };
      multiply(sum[i], pair(0, 0), pair(0, CHUNKS - 1), pair(2, 0), pair(2, CHUNKS - 1), of_first, of_second);
    }
    if (!BULK && after < units) load_values(after, block);
    unit = after;
  }

  total = sum_of_four(total);
  if (BULK) __syncthreads();  // all units were read: the sums take their place
  if (warp < WARPS) {
    if (quarter == 0) bests[warp][group] = best, totals[warp][group] = total;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (2 * quarter + j < SHARED) sums[(warp * SHARED + 2 * quarter + j) * DIM + c * BOX + group * 8 + i] = sum[i][2 * c + j];
  }
  for (int head = warp; warp < WARPS && head < SHARED; head += WARPS) {
    float score = 0.0f;
    for (int d = lane; d < DIM && split == 0; d += 32) score += number(queries + head * LINE + d) * number(newest_key + d);
    score = sum_of_warp(score);
    if (lane == 0) bests[WARPS][head] = split == 0 ? score * factor : NOTHING, totals[WARPS][head] = 1.0f;
  }
  __syncthreads();
  const auto write = [&](int head, int d, float y) {
    out[((u64)row * HEADS + kv_head * SHARED + head) * DIM + d] = (unsigned short)both(y, y);
  };
  const auto part_of = [&](int head, int one) { return parts + (((u64)row * HEADS + kv_head * SHARED + head) * splits + one) * (DIM + 2); };
  for (int at = threadIdx.x; at < SHARED * DIM; at += THREADS) {
    const int head = at / DIM, d = at % DIM;
    float highest = NOTHING, whole = 0.0f, y = 0.0f;
#pragma unroll
    for (int part = 0; part <= WARPS; part++) highest = fmaxf(highest, bests[part][head]);
#pragma unroll
    for (int part = 0; part <= WARPS; part++) {
      const float weight = bests[part][head] == NOTHING ? 0.0f : exp2f(bests[part][head] - highest);
      whole += weight * totals[part][head];
      if (part < WARPS || split == 0) y += weight * (part < WARPS ? sums[(part * SHARED + head) * DIM + d] : number(newest_value + d));
    }
    if (blocks == 1) {
      write(head, d, y / whole);
      continue;
    }
    float* to = part_of(head, split);
    to[d] = y;
    if (d == 0) to[DIM] = highest, to[DIM + 1] = whole;
  }
  if (blocks == 1) return;

  __shared__ u32 before;
  __syncthreads();
  if (threadIdx.x == 0) before = take_ticket(tickets + row * KV_HEADS + kv_head);
  __syncthreads();
  if (before + 1 < blocks) return;
  for (int at = threadIdx.x; at < SHARED * DIM; at += THREADS) {
    const int head = at / DIM, d = at % DIM;
    float highest = NOTHING, whole = 0.0f, y = 0.0f;
    for (int one = 0; one < blocks; one++) highest = fmaxf(highest, load_far(part_of(head, one) + DIM));
    for (int one = 0; one < blocks; one++) {
      const float weight = exp2f(load_far(part_of(head, one) + DIM) - highest);
      whole += weight * load_far(part_of(head, one) + DIM + 1);
      y += weight * load_far(part_of(head, one) + d);
    }
    write(head, d, y / whole);
  }
  if (threadIdx.x == 0) tickets[row * KV_HEADS + kv_head] = 0;
}
