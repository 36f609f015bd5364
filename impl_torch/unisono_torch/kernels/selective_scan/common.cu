// The selective scan in CUDA C++, compiled by NVRTC: what forward.py and backward.py say in Triton, for N <= 16 states.
//
// A block of four warps owns 32 channels, four lanes a channel, four states a lane. Time goes in tiles of 32 tokens, whose u, dt, z, dy
// are copied to shared memory two tiles ahead, and in groups of four tokens, of which each lane owns one: what there is a token and channel
// (softplus, gate, stores) is computed once, by the lane that owns it. Sums over states and channels are exchanged so that each lane keeps
// what it owns ("scattered"), a fourth of the exchanges that whole sums take.
//
// Constants: IN, STEP, BC, OUT (elements of u, z; of dt; of B, C; of y, dy), N, VEC (bytes of a copy), ALIGNED (N is 16, and four of B or C can be
// read at once), SOFTPLUS, HAS_Z, HAS_RESET, HAS_VALID.

constexpr int WARPS = 4, THREADS = 32 * WARPS, CHANNELS = 32, LANES = 4, TOKENS = 32, GROUPS = TOKENS / LANES, STATES = 16;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
#define ENDLESS __int_as_float(0x7f800000)
typedef Element<IN>::type In;
typedef Element<STEP>::type Step;
typedef Element<OUT>::type Out;
typedef Element<BC>::type Row;

template <class E> struct Tile {
  static constexpr int PITCH = CHANNELS + 16 / sizeof(E);  // rows begin in different banks
  E at[TOKENS][PITCH];
};

struct Place {
  int warp, lane, state, inner, channel, segment, tid;  // inner: channel in the block; state: the lane's first
  i64 batch, block;
  bool there;
};

__device__ __forceinline__ Place place(int dim, int segments) {
  Place p;
  int blocks = (dim + CHANNELS - 1) / CHANNELS, program = blockIdx.x;
  p.block = program % blocks;
  p.segment = program / blocks % segments;
  p.batch = program / (blocks * segments);
  p.tid = threadIdx.x;
  p.warp = p.tid / 32;
  p.lane = p.tid % LANES;
  p.state = LANES * p.lane;
  p.inner = p.tid / LANES;
  p.channel = int(p.block) * CHANNELS + p.inner;
  p.there = p.channel < dim;
  return p;
}

// log(1 + e^x) = max(x, 0) + 2 artanh(s), s = e / (2 + e) <= 1/3, e = e^-|x|: no digits are lost where e is small.
__device__ __forceinline__ float softplus(float x) {
  float e = exp2_(-fabsf(x) * LOG2E), s = e * inverse(2.f + e), q = s * s, series = 1.f / 15;
#pragma unroll
  for (int n = 6; n >= 0; --n) series = fmaf(series, q, 1.f / (2 * n + 1));
  return fmaf(2 * s, series, fmaxf(x, 0.f));
}

__device__ __forceinline__ float sigmoid(float x) {
  float e = exp2_(-fabsf(x) * LOG2E);
  return (x < 0 ? e : 1.f) * inverse(1.f + e);
}

// Four values of four lanes: the lane that owns token k keeps the sum of value k.
__device__ __forceinline__ float scattered(const float v[LANES], int lane) {
  bool high = lane & 2, odd = lane & 1;
  float a = (high ? v[2] : v[0]) + __shfl_xor_sync(~0u, high ? v[0] : v[2], 2);
  float b = (high ? v[3] : v[1]) + __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
  return (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 1);
}

// States `first + (j ^ swap)` of a channel, 0 where there is none.
__device__ __forceinline__ void read_states(const float* p, int width, int first, int swap, bool there, float h[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int n = first + (j ^ swap);
    h[j] = there && n < width ? p[n] : 0.f;
  }
}

__device__ __forceinline__ void write_states(float* p, int width, int first, int swap, bool there, const float h[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int n = first + (j ^ swap);
    if (there && n < width) p[n] = h[j];
  }
}

// All 16 states of a channel are in memory: four of them at once.
__device__ __forceinline__ void load4(const float* p, int swap, bool there, float h[4]) {
  float4 v = there ? *(const float4*)p : make_float4(0, 0, 0, 0);
  bool odd = swap & 1, high = swap & 2;
  float a = odd ? v.y : v.x, b = odd ? v.x : v.y, c = odd ? v.w : v.z, d = odd ? v.z : v.w;
  h[0] = high ? c : a, h[1] = high ? d : b, h[2] = high ? a : c, h[3] = high ? b : d;
}

// Rows `low` and after of [B, T, dim] into a tile; those past T become 0.
template <class E> __device__ __forceinline__ void fetch(Tile<E>& tile, const E* p, const Place& at, int low, int T, int row, int dim) {
  constexpr int EACH = VEC / sizeof(E) ? VEC / sizeof(E) : 1, PARTS = CHANNELS / EACH, ROWS = THREADS / PARTS;
  const int part = at.tid % PARTS * EACH, first = low + at.tid / PARTS;
  const int wide = max(0, min(EACH, dim - int(at.block) * CHANNELS - part)) * int(sizeof(E));
  const E* from = p + (at.batch * T + first) * row + at.block * CHANNELS + part;
#pragma unroll
  for (int i = 0; i < TOKENS / ROWS; ++i) {
    const int there = first + i * ROWS < T ? wide : 0;
    copy<EACH * sizeof(E)>(&tile.at[at.tid / PARTS + i * ROWS][part], there ? from + i64(i * ROWS) * row : p, there);
  }
}

// A thread's four states of a token of a tile's B or C, on their way through registers; those of tokens that are not valid are 0.
struct alignas(4 * sizeof(Row)) Held {
  Row at[4];
};
__device__ __forceinline__ Held hold(const Row* p, const u8* valid, const Place& at, int low, int T, int row) {
  const int n = at.tid % LANES * 4, t = low + at.tid / LANES;
  const i64 where = at.batch * T + t;
  const bool there = t < T && (!HAS_VALID || valid[where]);
  const Row* from = p + where * row + n;
  if (ALIGNED) return there ? *(const Held*)from : Held();
  Held held;
#pragma unroll
  for (int j = 0; j < 4; ++j) held.at[j] = there && n + j < N ? from[j] : Row(0);
  return held;
}

// As float32, state j in slot j ^ swap.
__device__ __forceinline__ void put4(float* to, const Held& held, int swap) {
  *(float4*)to = make_float4(widen<BC>(held.at[swap]), widen<BC>(held.at[1 ^ swap]), widen<BC>(held.at[2 ^ swap]), widen<BC>(held.at[3 ^ swap]));
}

// Bit 0: the token is there and valid; bit 1: it resets.
__device__ __forceinline__ u8 mark(const u8* reset, const u8* valid, const Place& at, int low, int T) {
  int t = low + at.tid;
  if (at.tid >= TOKENS || t >= T) return 0;
  i64 where = at.batch * T + t;
  return (HAS_VALID ? valid[where] != 0 : 1) | (HAS_RESET && reset[where] ? 2 : 0);
}

// States past a segment, number `at` of them all: they decay by exp(A sum dt), and what the segment makes of 0 comes to them.
__device__ __forceinline__ void carry(float h[4], const float* ends, const float* spans, i64 at, const Place& p, int dim, const float a2[4], int swap) {
  i64 where = at * dim + p.channel;
  float made[4], span = p.there ? spans[where] : 0.f;
  load4(ends + where * STATES + p.state, swap, p.there, made);
  bool cut = span == ENDLESS;
#pragma unroll
  for (int j = 0; j < 4; ++j) h[j] = (cut ? 0.f : exp2_(span * a2[j]) * h[j]) + made[j];
}

// dt and dt u of a tile's tokens, two tokens beside each other.
struct Steps {
  float4 at[GROUPS][LANES / 2][CHANNELS];
  __device__ __forceinline__ void put(int g, const Place& p, float delta, float gain) {
    ((float2*)&at[g][p.lane / 2][p.inner])[p.lane % 2] = make_float2(delta, gain);
  }
  __device__ __forceinline__ float own(int g, const Place& p) const { return ((const float*)&at[g][p.lane / 2][p.inner])[p.lane % 2 * 2]; }
  __device__ __forceinline__ void get(int g, const Place& p, float delta[LANES], float gain[LANES]) const {
    float4 a = at[g][0][p.inner], b = at[g][1][p.inner];
    delta[0] = a.x, gain[0] = a.y, delta[1] = a.z, gain[1] = a.w, delta[2] = b.x, gain[2] = b.y, delta[3] = b.z, gain[3] = b.w;
  }
};
