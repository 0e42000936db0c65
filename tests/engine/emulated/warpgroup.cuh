// In the place of engine/kernels/warpgroup.cuh. A product is done when somebody waits for it, and not before.

constexpr int TILE_ROWS = 64, TILE_COLUMNS = 256, SUMS = TILE_ROWS * TILE_COLUMNS / 128;

struct Product { const char *a, *b; bool add; };
static std::vector<std::vector<Product>> asked[1024];  // of each thread: groups, the last of which has not ended

inline void begin_products() {
  if (asked[self].empty()) asked[self].emplace_back();
}

inline void end_products() { asked[self].emplace_back(); }

inline void multiply_tiles(float (&)[SUMS], const char* a, const char* b, bool add) { asked[self].back().push_back({a, b, add}); }

// The word of two numbers of a row of a box, where the first row of it and the first number of 16 is at `at`.
inline u32 two_of(const char* at, int row, int number) {
  const u64 address = (u64)at;
  const int k = address % 128 / 2 + number;
  u32 two;
  memcpy(&two, (const char*)(address / 1024 * 1024) + row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2, 4);
  return two;
}

template <int LEFT>
inline void wait_for_products(float (&sums)[SUMS]) {
  auto& groups = asked[self];
  for (meet_warp(); groups.size() > LEFT + 1; groups.erase(groups.begin()))
    for (const Product& product : groups.front())
      for (int i = 0; i < SUMS; i++) {
        const int lane = self % 32, row = self % 128 / 32 * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = product.add ? sums[i] : 0.0f;
        for (int k = 0; k < 16; k += 2) {
          const u32 a = two_of(product.a, row, k), b = two_of(product.b, column, k);
          sum += low(a) * low(b) + high(a) * high(b);
        }
        sums[i] = sum;
      }
}

template <int COUNT>
inline void take_registers() {}
template <int COUNT>
inline void give_registers() {}

inline void meet_warpgroup(int warpgroup) {
  static Meeting meetings[8];
  meetings[self / 128].meet(128);
}

// Both together are one meeting, and who goes ahead does not wait for it.
static Meeting followings[2];
inline void go_ahead() { followings[self / threads_of_block].come_to(256); }
inline void wait_behind() { followings[self / threads_of_block].meet(256); }

inline void store_matrices(char* to, u32 a, u32 b, u32 c, u32 d) {
  static char* rows[32][32];
  const u32 warp = self / 32, lane = self % 32, words[] = {a, b, c, d};
  rows[warp][lane] = to;
  meet_warp();
  for (int i = 0; i < 4; i++) memcpy(rows[warp][i * 8 + lane / 4] + lane % 4 * 4, words + i, 4);
  meet_warp();
}
