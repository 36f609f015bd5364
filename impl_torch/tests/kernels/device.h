// A block of 128 CUDA threads on one thread of a CPU, in place of primitives.cu: each runs until it meets the others of its block at a
// barrier, or those of its warp at an exchange. In each round half of the warps, drawn anew, stand still, so that one warp is ahead of
// another wherever no barrier keeps them together. What a kernel reads before it was written is NaN.

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "meeting.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)

typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x; };
static Index blockIdx, threadIdx;

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class To, class From> To bits(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return bits<float>(x); }

static const int COUNT = 128, STACK = 1 << 16;
static float4 memory[16384];
static ucontext_t outside, threads[COUNT];
static bool ended[COUNT], turn[COUNT];
static float exchanged[2][COUNT];
static std::function<void()> program;

static Barrier of_block, of_warp[COUNT / 32];
static void others() { swapcontext(&threads[threadIdx.x], &outside); }
inline void __syncthreads() { meet(of_block, COUNT); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const int me = threadIdx.x, side = turn[me] = !turn[me];
  exchanged[side][me] = x;
  meet(of_warp[me / 32], 32);
  return exchanged[side][me ^ mask];
}

// Copies in the background come at once or as late as they may, as is drawn.
struct Copy {
  void* to;
  int bytes;
  float4 value;
  void come() const { memcpy(to, &value, bytes); }
};
static std::deque<std::vector<Copy>> groups[COUNT];  // of a thread, of which the last is not yet committed

static void begin() {
  groups[threadIdx.x].assign(1, {});
  program();
  ended[threadIdx.x] = true;
  others();
}

static void run_block(int block) {
  static std::vector<char> stacks(COUNT * STACK);
  blockIdx.x = block;
  memset(memory, 0xff, sizeof memory);
  for (int i = 0; i < COUNT; ++i) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = &stacks[i * STACK];
    threads[i].uc_stack.ss_size = STACK;
    makecontext(&threads[i], begin, 0);
    ended[i] = turn[i] = false;
  }
  for (bool some = true, slow = false; some;) {
    some = false;
    for (int i = 0; i < COUNT; ++i) {
      if (i % 32 == 0) slow = heads();
      if (ended[i]) continue;
      threadIdx.x = i;
      if (!slow) swapcontext(&outside, &threads[i]);
      some |= !ended[i];
    }
  }
}

inline float exp2_(float x) { return exp2f(x); }
inline float inverse(float x) { return 1 / x; }
template <int T> struct Element { typedef u16 type; };
template <> struct Element<0> { typedef float type; };
template <int T> float widen(typename Element<T>::type x);
template <> inline float widen<0>(float x) { return x; }
template <> inline float widen<1>(u16 x) { return bits<float>(unsigned(x) << 16); }
template <> inline float widen<2>(u16 x) { return bits<_Float16>(x); }
template <int T> typename Element<T>::type narrow(float x);
template <> inline float narrow<0>(float x) { return x; }
template <> inline u16 narrow<1>(float x) { return std::isnan(x) ? 0x7fff : (bits<unsigned>(x) + 0x7fff + (bits<unsigned>(x) >> 16 & 1)) >> 16; }
template <> inline u16 narrow<2>(float x) { return bits<u16>(_Float16(x)); }
template <int BYTES> void copy(void* to, const void* from, int there) {
  Copy each{to, BYTES, {}};
  memcpy(&each.value, from, there);
  if (BYTES < 4 || heads())
    each.come();
  else
    groups[threadIdx.x].back().push_back(each);
}
inline void commit() { groups[threadIdx.x].emplace_back(); }
template <int PENDING> void arrived() {
  for (auto& mine = groups[threadIdx.x]; mine.size() > PENDING + 1; mine.pop_front())
    for (const Copy& each : mine.front()) each.come();
}
