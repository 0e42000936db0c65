// In the place of engine/kernels/warp.cuh, where there is no GPU: the threads of a block are fibers that take turns, and what a warp does at
// once it does when all of its threads have come to it. So a kernel in CUDA C++ runs as it is written, slowly, on any machine.

#include "standard.hpp"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // blocks run one after another, in any order

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

using std::max;
using std::min;

struct Index { u32 x; };
static Index threadIdx, blockIdx;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t turns;
static bool (*begin_block)() = [] { return true; };  // false: the block before left something undone
static u32 progress;  // how often a fiber ended, or all met

// Where threads wait for each other.
struct Meeting {
  u32 come = 0, round = 0;
  void meet(u32 of) {
    const u32 mine = round;
    if (++come == of) come = 0, round++, progress++;
    while (round == mine) swapcontext(&fibers[threadIdx.x].context, &turns);
  }
};
static Meeting warps[32], block_meeting;

inline void __syncthreads() { block_meeting.meet(fibers.size()); }
inline void meet_warp() { warps[threadIdx.x / 32].meet(32); }

struct Quad { u32 a, b, c, d; };

inline Quad load(const void* at) {
  Quad q;
  memcpy(&q, __builtin_assume_aligned(at, 16), 16);
  return q;
}

inline Quad load_constant(const void* at) { return load(at); }
inline Quad load_common_constant(const void* at) { return load(at); }
inline Quad load_shared(const void* at) { return load(at); }
inline Quad load_where(const void* at, bool inside) { return inside ? load(at) : Quad{}; }

inline float __uint_as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float low(u32 two) { return __uint_as_float(two << 16); }
inline float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }
inline float number(const unsigned short* at) { return low((u32)*at); }

inline u32 rounded(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 both(float l, float h) { return rounded(l) | rounded(h) << 16; }

inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

struct Operands { u32 a[4], b[2]; };
static Operands operands[32][32];

// Which thread has which of the operands: PTX ISA, "Matrix Fragments for mma.m16n8k16".
inline void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  operands[warp][lane] = {{a0, a1, a2, a3}, {b0, b1}};
  meet_warp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 a = operands[warp][row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], b = operands[warp][column * 4 + k % 8 / 2].b[k / 8];
      c[i] += k % 2 ? high(a) * high(b) : low(a) * low(b);
    }
  }
  meet_warp();
}

inline u32 pick_half(u32 x, u32 y, bool upper) { return upper ? x >> 16 | (y & 0xffff0000) : (x & 0xffff) | y << 16; }

template <class Number>
inline Number from_lane(Number x, int lane) {
  static Number shared[32][32];
  const u32 warp = threadIdx.x / 32;
  shared[warp][threadIdx.x % 32] = x;
  meet_warp();
  const Number theirs = shared[warp][lane];
  meet_warp();
  return theirs;
}

template <class Both>
inline float among(float x, int lanes, Both both) {
  for (int i = 1; i < lanes; i *= 2) x = both(x, from_lane(x, (threadIdx.x % 32) ^ i));
  return x;
}

inline float sum_of_four(float x) { return among(x, 4, [](float a, float b) { return a + b; }); }
inline float sum_of_warp(float x) { return among(x, 32, [](float a, float b) { return a + b; }); }
inline float max_of_four(float x) { return among(x, 4, [](float a, float b) { return max(a, b); }); }
inline bool any_of_warp(bool x) { return among(x, 32, [](float a, float b) { return max(a, b); }) > 0; }

inline u32 take_ticket(u32* tickets) { return (*tickets)++; }
inline float load_far(const float* at) { return *at; }
inline void wait_for_kernel_before() {}

// As cuLaunchKernel does it, `values` are the addresses of the arguments. Returns 0; or 1 if threads wait for some that never come, or for
// none of what they began.
template <class... Arguments, size_t... i>
int launch(void (*kernel)(Arguments...), u32 blocks, u32 threads, void** values, std::index_sequence<i...>) {
  static void (*body)(void**);
  static void** given;
  static void (*function)(Arguments...);
  function = kernel, given = values;
  body = [](void** all) { function(*(std::remove_reference_t<Arguments>*)all[i]...); };
  static std::mt19937 random;
  std::vector<u32> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);  // none may count on those before it
  for (u32 block : order) {
    if (!begin_block()) return 1;
    blockIdx.x = block;
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &turns;
      makecontext(&fiber.context, [] { body(given), fibers[threadIdx.x].done = true, progress++; }, 0);
    }
    for (u32 left = threads; left > 0;) {
      const u32 before = progress;
      left = 0;
      for (u32 thread = 0; thread < threads; thread++) {
        if (fibers[thread].done) continue;
        threadIdx.x = thread;
        swapcontext(&turns, &fibers[thread].context);
        left += !fibers[thread].done;
      }
      if (left > 0 && progress == before) return 1;
    }
  }
  return 0;
}

template <class... Arguments>
int launch(void (*kernel)(Arguments...), u32 blocks, u32 threads, void** values) {
  return launch(kernel, blocks, threads, values, std::index_sequence_for<Arguments...>());
}
