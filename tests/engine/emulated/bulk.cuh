// In the place of engine/kernels/bulk.cuh. A copy takes its time: it is done some time later, while somebody waits, and some take long.

constexpr int BOX = 64, BOX_BYTES = 2 * BOX;

// What tests/engine/emulating.py makes: where the tensor begins, columns, rows and matrices, bytes from one row and matrix to the next, and the
// rows of a box.
struct Map { u64 words[16]; };

inline char* dynamic_memory() {
  static __align__(1024) char dynamic_bytes[1 << 17];
  return dynamic_bytes;
}

struct Barrier { int arrivals = 0, left = 0, bytes = 0, phase = 0; };
static std::map<u64*, Barrier> barriers;

struct Copy { u64 due; std::function<void()> make; };
static std::vector<Copy> copies;
static u64 waits;  // how often somebody found that he had to wait
constexpr u64 LONG = 50000;  // of those: while a warp does much else

static const bool hooked = (begin_block = [] {
  memset(dynamic_memory(), 0xff, 1 << 17);  // no numbers
  barriers.clear();
  return copies.empty();
}, true);

inline void begin_barrier(u64* barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0}; }

inline void change(u64* barrier, int arrivals, int bytes) {
  Barrier& b = barriers.at(barrier);
  b.left -= arrivals, b.bytes += bytes;
  if (b.left < 0) abort();
  if (b.left == 0 && b.bytes == 0) b.left = b.arrivals, b.phase++, progress++;
}

inline void arrive(u64* barrier) { change(barrier, 1, 0); }
inline void arrive_expecting(u64* barrier, int bytes) { change(barrier, 1, bytes); }

inline void wait_for_phase(u64* barrier, int phase) {
  while (barriers.at(barrier).phase % 2 == phase % 2) {
    waits++;
    for (size_t i = 0; i < copies.size(); i++) {
      if (copies[i].due > waits) continue;
      std::swap(copies[i], copies.back());
      const auto copy = copies.back();
      copies.pop_back();
      copy.make();
      break;
    }
    if (!copies.empty()) progress++;
    swapcontext(&fibers[threadIdx.x].context, &turns);
  }
}

inline void fetch(char* to, const Map* map, int column, int row, int matrix, u64* barrier) {
  if ((u64)to % 1024) abort();  // or the engine would put the 16 bytes of a row elsewhere
  static std::mt19937 random;
  progress++;
  copies.push_back({waits + (random() % 8 == 0 ? LONG : random() % 64), [=] {
    const u64* words = map->words;
    const int rows = words[6];
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < BOX; i++) {
        const s64 x = column + i, y = row + r;
        unsigned short value = 0;
        if (x < (s64)words[1] && y < (s64)words[2] && matrix < (s64)words[3])
          memcpy(&value, (const char*)words[0] + x * 2 + y * (s64)words[4] + matrix * (s64)words[5], 2);
        memcpy(to + r * BOX_BYTES + (i / 8 ^ r % 8) * 16 + i % 8 * 2, &value, 2);
      }
    change(barrier, 0, -rows * BOX_BYTES);
  }});
}

inline void fetch(char* to, const Map* map, int column, int row, u64* barrier) { fetch(to, map, column, row, 0, barrier); }
