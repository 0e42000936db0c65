// In the place of engine/kernels/warp.cuh, where there is no GPU: the threads of a block are fibers that take turns, and what a warp does at
// once it does when all of its threads have come to it. So a kernel in CUDA C++ runs as it is written, slowly, on any machine.
//
// The blocks of a cluster run together: their threads are fibers one after another, and `self` is the number of the one whose turn it is.

#include "standard.hpp"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // blocks run one after another, in any order; those of a cluster share nothing so, and have dynamic memory only

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

using std::max;
using std::min;

struct Index { u32 x; };
static Index threadIdx, blockIdx, gridDim;
static u32 self;
static u32 threads_of_block;

struct Fiber {
  ucontext_t begin;
  jmp_buf here;
  bool begun = false;
  std::function<bool()> ready;  // to go on: asked without a turn of its own
  bool done = false;
};
static std::vector<Fiber> fibers;
static std::vector<std::unique_ptr<char[]>> stacks;  // of fibers, and then of those of the next blocks
constexpr size_t OF_STACK = 1 << 16;
static jmp_buf turns;
static void (*begin_cluster)() = [] {};
static void (*end_block)(u32) = [](u32) {};
static bool (*end_cluster)() = [] { return true; };  // false: it left something undone
static u32 progress;  // how often a fiber ended, or all met
constexpr u32 MOST_IDLE = 100;  // rounds without any

// A fiber goes on, until it gives its turn back: by jumps, which ask nothing of the system.
__attribute__((noinline)) inline void take_turn(Fiber& fiber) {
  if (_setjmp(turns)) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  setcontext(&fiber.begin);
}

// Others have their turns until it is ready.
__attribute__((noinline)) inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  fibers[self].ready = ready;
  if (!_setjmp(fibers[self].here)) _longjmp(turns, 1);
}

// Where threads wait for each other.
struct Meeting {
  u32 come = 0, round = 0;
  void come_to(u32 of) {
    if (++come == of) come = 0, round++, progress++;
  }
  void meet(u32 of) {
    const u32 mine = round;
    come_to(of);
    wait_until([&] { return round != mine; });
  }
};
static Meeting warps[32], block_meetings[2];

inline void __syncthreads() { block_meetings[self / threads_of_block].meet(threads_of_block); }
inline void meet_warp() { warps[self / 32].meet(32); }

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

inline void store(void* at, const Quad& q) { memcpy(__builtin_assume_aligned(at, 16), &q, 16); }
inline void store_shared(void* at, const Quad& q) { store(at, q); }

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
inline float power_of_two(float x) { return exp2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

struct Operands { u32 a[4], b[2]; };
static Operands operands[32][32];

// Which thread has which of the operands: PTX ISA, "Matrix Fragments for mma.m16n8k16".
inline void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 warp = self / 32, lane = self % 32;
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
  const u32 warp = self / 32;
  shared[warp][self % 32] = x;
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

// As cuLaunchKernel does it, `values` are the addresses of the arguments; `together` are the blocks of a cluster. Returns 0; or 1 if threads wait for some that never come, or for
// none of what they began.
template <class... Arguments, size_t... i>
int launch(void (*kernel)(Arguments...), u32 blocks, u32 threads, u32 together, void** values, std::index_sequence<i...>) {
  static void (*body)(void**);
  static void** given;
  static void (*function)(Arguments...);
  function = kernel, given = values;
  body = [](void** all) { function(*(std::remove_reference_t<Arguments>*)all[i]...); };
  static std::mt19937 random;
  if (blocks % together) return 1;
  threads_of_block = threads, gridDim.x = blocks;
  std::vector<u32> order(blocks / together);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);  // none may count on those before it
  for (u32 cluster : order) {
    begin_cluster();
    fibers = std::vector<Fiber>(threads * together);
    while (stacks.size() < fibers.size()) stacks.emplace_back(new char[OF_STACK]);
    for (size_t thread = 0; thread < fibers.size(); thread++) {
      Fiber& fiber = fibers[thread];
      getcontext(&fiber.begin);
      fiber.begin.uc_stack.ss_sp = stacks[thread].get(), fiber.begin.uc_stack.ss_size = OF_STACK;
      makecontext(&fiber.begin, [] { body(given), fibers[self].done = true, progress++, _longjmp(turns, 1); }, 0);
    }
    std::vector<u32> running(together, threads);
    for (u32 left = threads * together, idle = 0; left > 0; idle++) {
      const u32 before = progress;
      bool sits_out = false;
      for (self = 0; self < threads * together; self++) {
        Fiber& fiber = fibers[self];
        if (self % 32 == 0) sits_out = random() % 4 == 0;  // warps go at different speeds
        if (fiber.done || sits_out) continue;
        const u32 rank = self / threads;
        threadIdx.x = self % threads, blockIdx.x = cluster * together + rank;
        if (!fiber.ready || fiber.ready()) fiber.ready = nullptr, take_turn(fiber);
        if (!fiber.done) continue;
        left--;
        if (--running[rank] == 0) end_block(rank);
      }
      if (progress != before) idle = 0;
      if (idle > MOST_IDLE) return 1;
    }
    if (!end_cluster()) return 1;
  }
  return 0;
}

template <class... Arguments>
int launch(void (*kernel)(Arguments...), u32 blocks, u32 threads, u32 together, void** values) {
  return launch(kernel, blocks, threads, together, values, std::index_sequence_for<Arguments...>());
}
