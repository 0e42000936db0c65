// What a warp does at once, and how it reads, in PTX. Numbers are bfloat16, two of them in a word.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

struct Quad { u32 a, b, c, d; };

// Of what no kernel of this step writes: it need not wait.
__device__ inline Quad load_constant(const void* at) {
  Quad q;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "l"(at));
  return q;
}

// The same, if other blocks of the multiprocessor read it, too.
__device__ inline Quad load_common_constant(const void* at) {
  Quad q;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "l"(at));
  return q;
}

__device__ inline Quad load(const void* at) {
  Quad q;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "l"(at) : "memory");
  return q;
}

// As `load_constant`, if it is `inside`; else zeros.
__device__ inline Quad load_where(const void* at, bool inside) {
  Quad q;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
               " @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "=&r"(q.a), "=&r"(q.b), "=&r"(q.c), "=&r"(q.d) : "l"(at), "r"((u32)inside));
  return q;
}

__device__ inline Quad load_shared(const void* at) {
  Quad q;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.a), "=r"(q.b), "=r"(q.c), "=r"(q.d) : "r"((u32)__cvta_generic_to_shared(at)) : "memory");
  return q;
}

__device__ inline void store_shared(void* at, const Quad& q) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"((u32)__cvta_generic_to_shared(at)), "r"(q.a), "r"(q.b), "r"(q.c), "r"(q.d) : "memory");
}

__device__ inline void store(void* at, const Quad& q) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(at), "r"(q.a), "r"(q.b), "r"(q.c), "r"(q.d) : "memory");
}

// As good as exact, but zero below 2^-126.
__device__ inline float power_of_two(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }

__device__ inline float low(u32 two) { return __uint_as_float(two << 16); }
__device__ inline float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }
__device__ inline u32 both(float l, float h) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(h), "f"(l)); return r; }
__device__ inline float number(const unsigned short* at) { return low((u32)*at); }

// The lower half of both, or the upper ones.
__device__ inline u32 pick_half(u32 x, u32 y, bool upper) { return __byte_perm(x, y, upper ? 0x7632 : 0x5410); }

// c += a * b of 16 rows of a, 8 columns of b and 16 of the inner dimension.
__device__ inline void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The sum of what four neighbours have.
__device__ inline float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline float max_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

template <class Number>
__device__ inline Number from_lane(Number x, int lane) { return __shfl_sync(~0u, x, lane); }

__device__ inline bool any_of_warp(bool x) { return __any_sync(~0u, x); }
__device__ inline void meet_warp() { __syncwarp(); }

// How many blocks took one before this one. What all threads of those stored before they met, this block's may load from afar.
__device__ inline u32 take_ticket(u32* tickets) {
  u32 before;
  asm volatile("fence.acq_rel.gpu; atom.add.acq_rel.gpu.u32 %0, [%1], 1; fence.acq_rel.gpu;" : "=r"(before) : "l"(tickets) : "memory");
  return before;
}

__device__ inline float load_far(const float* at) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}

// Until the kernel before this one is done; and let the one after it begin to wait for this (engine/kernels/overlap.py).
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
