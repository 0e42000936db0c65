// In the place of engine/kernels/bulk.cuh. A copy takes its time: it is done some time later, while somebody waits; some take long, and some
// are there at once.

constexpr int BOX = 64, BOX_BYTES = 2 * BOX;

// What tests/engine/emulating.py makes: where the tensor begins, columns, rows and matrices, bytes from one row and matrix to the next, and the
// rows and matrices of a box.
struct Map { u64 words[16]; };

constexpr u32 DYNAMIC = 1 << 18;
static __align__(1024) char dynamic_bytes[2][DYNAMIC];  // of each block of a cluster

inline int rank_in_cluster() { return self / threads_of_block; }
inline char* dynamic_memory() { return dynamic_bytes[rank_in_cluster()]; }

struct Barrier { int arrivals = 0, left = 0, bytes = 0, phase = 0; };
static std::map<u64*, Barrier> barriers;

struct Copy { u64 due; std::function<void()> make; };
static std::vector<Copy> copies;
static u64 waits;  // how often somebody found that he had to wait
constexpr u64 LONG = 50000;  // of those: while a warp does much else

static const bool hooked = (begin_cluster = [] {
  memset(dynamic_bytes, 0xff, sizeof(dynamic_bytes));  // no numbers
  barriers.clear();
}, end_block = [](u32 rank) {  // its memory is another's
  barriers.erase(barriers.lower_bound((u64*)dynamic_bytes[rank]), barriers.lower_bound((u64*)dynamic_bytes[rank + 1]));
}, end_cluster = [] { return copies.empty(); }, true);

inline void begin_barrier(u64* barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0}; }

inline void change(u64* barrier, int arrivals, int bytes) {
  Barrier& b = barriers.at(barrier);
  b.left -= arrivals, b.bytes += bytes;
  if (b.left < 0) abort();
  if (b.left == 0 && b.bytes == 0) b.left = b.arrivals, b.phase++, progress++;
}

inline void arrive(u64* barrier) { change(barrier, 1, 0); }
inline void arrive_expecting(u64* barrier, int bytes) { change(barrier, 1, bytes); }

// Until something is so; who asks makes a copy that is due.
template <class Done>
inline void wait_for_copies(Done done) {
  wait_until([=] {
    if (done()) return true;
    waits++;
    for (size_t i = 0; i < copies.size(); i++) {
      if (copies[i].due > waits) continue;
      std::swap(copies[i], copies.back());
      const auto copy = copies.back();
      copies.pop_back();
      copy.make(), progress++;
      break;
    }
    if (!copies.empty()) progress++;
    return done();
  });
}

inline void wait_for_phase(u64* barrier, int phase) {
  wait_for_copies([=] { return barriers.at(barrier).phase % 2 != phase % 2; });
}

inline void copy_later(std::function<void()> make) {
  static std::mt19937 random;
  progress++;
  const u32 luck = random() % 8;
  if (luck == 0) make(); else copies.push_back({waits + (luck == 1 ? LONG : random() % 64), make});
}

// The numbers of a box, and where they are in shared memory.
template <class Each>
inline void each_of_box(const Map* map, char* there, int column, int row, int matrix, Each each) {
  if ((u64)there % 1024) abort();  // or the engine would put the 16 bytes of a row elsewhere
  const u64* words = map->words;
  for (int r = 0; r < (int)(words[6] * words[7]); r++)
    for (int i = 0; i < BOX; i++) {
      const s64 x = column + i, y = row + r % words[6], z = matrix + r / words[6];
      const bool inside = x < (s64)words[1] && y < (s64)words[2] && z < (s64)words[3];
      char* number = inside ? (char*)words[0] + x * 2 + y * (s64)words[4] + z * (s64)words[5] : nullptr;
      each(number, there + r * BOX_BYTES + (i / 8 ^ r % 8) * 16 + i % 8 * 2);
    }
}

inline void fetch(char* to, const Map* map, int column, int row, int matrix, u64* barrier) {
  copy_later([=] {
    each_of_box(map, to, column, row, matrix, [](const char* from, char* there) { from ? memcpy(there, from, 2) : memset(there, 0, 2); });
    change(barrier, 0, -(int)(map->words[6] * map->words[7]) * BOX_BYTES);
  });
}

inline void fetch(char* to, const Map* map, int column, int row, u64* barrier) { fetch(to, map, column, row, 0, barrier); }

// ── back to memory ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

static std::map<u32, std::array<int, 2>> stores;  // of each thread: those asked for, and those that belong to a group

inline void show_to_copies() {}

inline void store(const Map* map, char* from, int column, int row) {
  const u32 mine = self;
  stores[mine][0]++;
  copy_later([=] {
    each_of_box(map, from, column, row, 0, [](char* to, const char* there) { if (to) memcpy(to, there, 2); });
    stores[mine][0]--, stores[mine][1]--;
  });
}

inline void end_stores() { stores[self][1] = stores[self][0]; }
inline void wait_for_stores() { wait_for_copies([] { return stores[self][1] <= 0; }); }

// ── among blocks of a cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

inline void meet_cluster() {
  static Meeting meeting;
  meeting.meet(fibers.size());
}

template <class Any>
inline Any* of_block(Any* mine, int rank) { return (Any*)((char*)mine + (rank - rank_in_cluster()) * (s64)DYNAMIC); }

inline void arrive_at(u64* barrier, int rank) { arrive(of_block(barrier, rank)); }

inline void fetch_for(int blocks, char* to, const Map* map, int column, int row, u64* barrier) {
  for (int rank = 0; rank < blocks; rank++) fetch(of_block(to, rank), map, column, row, of_block(barrier, rank));
}
