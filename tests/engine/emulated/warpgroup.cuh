// In the place of engine/kernels/warpgroup.cuh. A product is done when somebody waits for it, and not before.

constexpr int TILE_ROWS = 64, TILE_COLUMNS = 256, SUMS = TILE_ROWS * TILE_COLUMNS / 128;

// With a in registers, `registers` are those of this thread; b is turned then, and its boxes are `apart`.
struct Product { float* sums; int columns; const char* a; const u32* registers; const char* b; int apart; bool add; };
static std::vector<std::vector<Product>> asked[1024];  // of each thread: groups, the last of which has not ended

inline void begin_products() {
  if (asked[self].empty()) asked[self].emplace_back();
}

inline void end_products() { asked[self].emplace_back(); }

template <int COUNT>
inline void multiply_tiles(float (&sums)[COUNT], const char* a, const char* b, bool add) {
  asked[self].back().push_back({sums, 2 * COUNT, a, nullptr, b, 0, add});
}

inline void multiply_turned(float (&sums)[SUMS / 2], const u32* a, const char* b, int apart, bool add) {
  asked[self].back().push_back({sums, TILE_COLUMNS / 2, nullptr, a, b, apart, add});
}

// A number of a row of a box, where the first row of it and the first number that is meant are at `at`.
inline float number_of(const char* at, int row, int number) {
  const u64 address = (u64)at;
  const int k = address % 128 / 2 + number;
  return ::number((const unsigned short*)((const char*)(address / 1024 * 1024) + row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2));
}

inline void make(const Product& product) {
  static u32 registers[32][32][4];
  const u32 warp = self / 32, lane = self % 32;
  if (product.registers) memcpy(registers[warp][lane], product.registers, 16);
  meet_warp();
  for (int i = 0; i < product.columns / 2; i++) {
    const int group = lane / 4, half = i % 4 / 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = product.add ? product.sums[i] : 0.0f;
    for (int k = 0; k < 16; k++) {
      if (product.registers) {
        const u32 two = registers[warp][group * 4 + k % 8 / 2][half + k / 8 * 2];
        sum += (k % 2 ? high(two) : low(two)) * number_of(product.b + column / BOX * product.apart, k, column % BOX);
      } else {
        sum += number_of(product.a, self % 128 / 32 * 16 + group + half * 8, k) * number_of(product.b, column, k);
      }
    }
    product.sums[i] = sum;
  }
  meet_warp();
}

template <int LEFT>
inline void wait_for_products() {
  auto& groups = asked[self];
  for (; groups.size() > LEFT + 1; groups.erase(groups.begin()))
    for (const Product& product : groups.front()) make(product);
}

template <int LEFT, int COUNT>
inline void wait_for_products(float (&)[COUNT]) { wait_for_products<LEFT>(); }

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
