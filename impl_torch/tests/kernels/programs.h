// Several blocks of CUDA threads at once on one thread of a CPU, in place of mom_gru/primitives.cu: each thread runs until it waits for
// others, at a barrier of its block or its warp, or for a value that another block has to store. In each round half of the warps, drawn
// anew, stand still, so that what one program stores reaches another in any order. Where a program is `stopped`, as a GPU does that several
// processes share, one drawn stands still until the others store nothing any more. What a kernel reads of shared memory before it was
// written is NaN.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "meeting.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define DEVICE inline
#define SHARED(name) float* name = (float*)blocks[program()].room.data()

typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;
struct alignas(16) float4 { float x, y, z, w; };
inline u16 to_half(float x) {
  const _Float16 y = x;
  u16 z;
  memcpy(&z, &y, sizeof z);
  return z;
}
inline float from_half(u16 x) {
  _Float16 y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<std::pair<float*, float4>> copies;
  int number, block;
  bool ended;
};
struct Warp {
  Barrier barrier;
  float value[32];
  unsigned a[32][4], b[32][2];
};
struct Block {
  Barrier barrier;
  std::vector<float4> room;
};
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Block> blocks;
static ucontext_t outside;
static int current, count, quiet;  // count: threads of a block; quiet: rounds without a store
static std::function<void()> kernel;

static void others() { swapcontext(&threads[current].context, &outside); }

inline int thread() { return threads[current].number; }
inline int program() { return threads[current].block; }
static Warp& own() { return warps[current / 32]; }
inline void sync() { meet(blocks[program()].barrier, count); }
inline void sync_warp() { meet(own().barrier, 32); }
inline float from_lane(float x, int mask) {
  const int lane = thread() % 32;
  own().value[lane] = x;
  sync_warp();
  x = own().value[lane ^ mask];
  sync_warp();
  return x;
}
inline unsigned bits(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float number(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float exp2_(float x) { return exp2f(x); }
inline void hold(float&) {}
inline float4 peek4(const float* p) {
  others();
  return {p[0], p[1], p[2], p[3]};
}
inline float peek(const float* p) {
  others();
  return *p;
}
inline void poke(float* p, float v) {
  others();  // of two stores, the second may be seen late
  *p = v;
  quiet = 0;
}
// Copies in the background come at once or as late as they may, as is drawn.
inline void copy16(float* to, const float* from) {
  if (heads())
    memcpy(to, from, 16);
  else
    threads[current].copies.push_back({to, *(const float4*)from});
}
inline void arrived() {
  auto& copies = threads[current].copies;
  for (auto& [to, value] : copies) memcpy(to, &value, 16);
  copies.clear();
}

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int lane = thread() % 32;
  Warp& warp = own();
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  sync_warp();
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 8; k++)  // of operands the first 11 bits
      c[e] += number(warp.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2] & ~0x1fffu) * number(warp.b[column * 4 + k % 4][k / 4] & ~0x1fffu);
  }
  sync_warp();
}

static void begin() {
  kernel();
  threads[current].ended = true;
  others();
}

// Whether all came to their ends
static bool run_all(int programs, int each, int bytes, bool stopped = false) {
  count = each;
  threads.assign(programs * each, Thread());
  warps.assign(programs * each / 32, Warp());
  blocks.assign(programs, Block());
  for (Block& block : blocks) {
    block.room.resize(bytes / 16 + 1);
    memset((void*)block.room.data(), 0xff, block.room.size() * 16);
  }
  for (int i = 0; i < programs * each; i++) {
    Thread& thread = threads[i];
    thread.number = i % each, thread.block = i / each, thread.ended = false;
    thread.stack.resize(1 << 16);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, begin, 0);
  }
  int still = -1;
  for (quiet = 0; quiet < 100000; quiet++) {  // of a program with many banks: thousands
    bool some = false, slow = false;
    if (stopped && still < 0 && heads() && heads()) still = drawn(2 * programs);
    if (still >= programs || quiet > 300) still = -1;
    for (current = 0; current < programs * each; current++) {
      if (current % 32 == 0) slow = heads();
      if (threads[current].ended) continue;
      if (!slow && threads[current].block != still) swapcontext(&outside, &threads[current].context);
      some |= !threads[current].ended;
    }
    if (!some) return true;
  }
  return false;
}
