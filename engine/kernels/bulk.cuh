// Copies in bulk: boxes of a tensor that the device's copy engine puts into shared memory by itself, and the barriers that tell when they are
// there. A box has rows of 64 numbers, 128 bytes; the 16 bytes at `i` of its row `r` are put at `i ^ r % 8`, so that threads which read the
// same place of neighbouring rows meet no conflict of banks. Of what is beyond the tensor come zeros.

constexpr int BOX = 64, BOX_BYTES = 2 * BOX;  // of a row

struct __align__(64) Map { u64 words[16]; };  // tensor_map.py beside this makes it

__device__ inline char* dynamic_memory() {
  extern __shared__ __align__(1024) char dynamic_bytes[];
  return dynamic_bytes;
}

__device__ inline u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// For so many arrivals in each of its phases. All threads must meet before another uses it.
__device__ inline void begin_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;"
               :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

// Arrive, and have the phase last until so many bytes have come, too.
__device__ inline void arrive_expecting(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until phase 0, 1, … is over; only its parity counts.
__device__ inline void wait_for_phase(u64* barrier, int phase) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }"
               :: "r"(shared_address(barrier)), "r"(phase & 1) : "memory");
}

// The box of a matrix that begins at this row and column.
__device__ inline void fetch(char* to, const Map* map, int column, int row, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}

// The same of one of several matrices.
__device__ inline void fetch(char* to, const Map* map, int column, int row, int matrix, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
               :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(barrier)) : "memory");
}

// ── back to memory ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

// What this thread has stored in shared memory, the copy engine sees after this.
__device__ inline void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box, from shared memory; nothing is written beyond the matrix.
__device__ inline void store(const Map* map, const char* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}

__device__ inline void end_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all that this thread has stored so has been read from shared memory.
__device__ inline void wait_for_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ── among blocks of a cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

__device__ inline int rank_in_cluster() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
}

// All threads of all blocks.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// At the same barrier of the block that has this rank.
__device__ inline void arrive_at(u64* barrier, int rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }"
               :: "r"(shared_address(barrier)), "r"(rank) : "memory");
}

// As `fetch`, into the memory of `blocks` blocks, the first of the cluster, and each of them hears of it at its own barrier.
__device__ inline void fetch_for(int blocks, char* to, const Map* map, int column, int row, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((unsigned short)((1 << blocks) - 1))
               : "memory");
}
