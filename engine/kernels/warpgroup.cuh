// What four warps do at once, on Hopper: they multiply tiles that lie in shared memory, as boxes of bulk.cuh, and their sums are in registers.
// A product has been asked for when the call returns; it is done when its group has been waited for.

// The sums of a warpgroup: 64 rows and 256 columns. A thread has of row `warp * 16 + lane / 4`, in sums[4 * j] and the next, the columns
// `8 * j + lane % 4 * 2` and the next; in the two after them, those of eight rows further.
constexpr int TILE_ROWS = 64, TILE_COLUMNS = 256, SUMS = TILE_ROWS * TILE_COLUMNS / 128;

// Before the first product of a group: registers and shared memory are as these threads see them.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than so many groups are not done.
template <int LEFT>
__device__ inline void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }

// The same; and whoever reads these sums does so after it.
template <int LEFT, int COUNT>
__device__ inline void wait_for_products(float (&sums)[COUNT]) {
  wait_for_products<LEFT>();
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i]) :: "memory");
}

// Of a box that begins at a multiple of 1,024 bytes, or up to 96 bytes further in its first row: eight rows are 1,024 bytes.
__device__ inline u64 describe_box(const char* at) {
  return (u64)((shared_address(at) & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Of boxes whose rows are the inner dimension: 64 columns are in the first, the next 64 `apart` bytes further.
__device__ inline u64 describe_turned(const char* at, int apart) {
  return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(apart >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SIXTY_FOUR(i) SIXTEEN(i), SIXTEEN(i + 16), SIXTEEN(i + 32), SIXTEEN(i + 48)

// sums (+)= a * b of 16 numbers of the inner dimension, 32 bytes of each of 64 rows of a and 256 rows of b.
__device__ inline void multiply_tiles(float (&sums)[SUMS], const char* a, const char* b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "
      "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "
      "%119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1, 0, 0; }"
      : SIXTY_FOUR(0), SIXTY_FOUR(64) : "l"(describe_box(a)), "l"(describe_box(b)), "r"((int)add));
}

// The same of 128 rows of b.
__device__ inline void multiply_tiles(float (&sums)[SUMS / 2], const char* a, const char* b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, 0; }"
      : SIXTY_FOUR(0) : "l"(describe_box(a)), "l"(describe_box(b)), "r"((int)add));
}

// sums (+)= a * b of 16 numbers of the inner dimension: a from registers, in which a thread has of its two rows the numbers `lane % 4 * 2` and
// the next, and those eight further; b 16 rows of two boxes, `apart` bytes from each other.
__device__ inline void multiply_turned(float (&sums)[SUMS / 2], const u32* a, const char* b, int apart, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      : SIXTY_FOUR(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_turned(b, apart)), "r"((int)add));
}

#undef FOUR
#undef SIXTEEN
#undef SIXTY_FOUR

// Registers of each thread, of which a warpgroup that only copies needs few.
template <int COUNT>
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT>
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// The threads of this warpgroup; each has a barrier of its own.
__device__ inline void meet_warpgroup(int warpgroup) { asm volatile("bar.sync %0, 128;" :: "r"(warpgroup + 1) : "memory"); }

// One warpgroup waits until another has gone ahead: as often as that says so.
__device__ inline void go_ahead() { asm volatile("bar.arrive 8, 256;" ::: "memory"); }
__device__ inline void wait_behind() { asm volatile("bar.sync 8, 256;" ::: "memory"); }

// Four matrices of 8 x 8 numbers from the registers of a warp, a row of 16 bytes to where the thread that has its number points. Of each a
// thread has the two at row `lane / 4`, column `lane % 4 * 2`.
__device__ inline void store_matrices(char* to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(shared_address(to)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
