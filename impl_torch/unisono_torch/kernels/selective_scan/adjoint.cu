// What reaches the state before each segment from the outputs in it [B, segments, D, 16], and the sum of dt over a segment.

constexpr int STAGES = 3;

struct Adjoint {
  Tile<In> z[STAGES];
  Tile<Step> dt[STAGES];
  Tile<Out> dy[STAGES];
  float C[TOKENS][STATES];
  Steps steps;  // dt and dy with the gate
  u8 marks[TOKENS];
};
extern "C" __device__ const int shared_bytes = sizeof(Adjoint);

extern "C" __global__ void __launch_bounds__(THREADS, 3) scan(
    const Step* dt, const float* A, const Row* C, const In* z, const u8* reset, const u8* valid, const Out* dy, float* ends, float* spans, int T,
    int dim, int segments, int tiles, int dt_row, int z_row, int c_row) {
  extern __shared__ float4 memory[];
  Adjoint& s = *(Adjoint*)memory;
  const Place at = place(dim, segments);
  const int low = at.segment * tiles, count = (T + TOKENS - 1) / TOKENS, high = min(low + tiles, count);
  float a2[4], G[4] = {0.f, 0.f, 0.f, 0.f}, span = 0.f;
  read_states(A + i64(at.channel) * N, N, at.state, 0, at.there, a2);
#pragma unroll
  for (int j = 0; j < 4; ++j) a2[j] *= LOG2E;
  bool cut = false;
  Held held;
  auto bring = [&](int tile) {
    const int stage = (tile + STAGES) % STAGES, t = tile < low ? T : tile * TOKENS;
    fetch(s.dt[stage], dt, at, t, T, dt_row, dim);
    if (HAS_Z) fetch(s.z[stage], z, at, t, T, z_row, dim);
    fetch(s.dy[stage], dy, at, t, T, dim, dim);
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) bring(high - 1 - i);
  held = hold(C, valid, at, (high - 1) * TOKENS, T, c_row);
  u8 marked = mark(reset, valid, at, (high - 1) * TOKENS, T);

  for (int tile = high - 1; tile >= low; --tile) {
    const int top = tile * TOKENS, stage = tile % STAGES, next = tile > low ? top - TOKENS : T;
    arrived<STAGES - 2>();
    __syncthreads();
    put4(&s.C[at.tid / LANES][at.state], held, 0);
    if (at.tid < TOKENS) s.marks[at.tid] = marked;
    bring(tile - STAGES + 1);
    held = hold(C, valid, at, next, T, c_row);
    if (HAS_RESET || HAS_VALID) marked = mark(reset, valid, at, next, T);
    if (HAS_VALID) __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int token = g * LANES + at.lane;
      const bool live = HAS_VALID ? s.marks[token] & 1 : top + token < T;
      float delta = widen<STEP>(s.dt[stage].at[token][at.inner]), d = widen<OUT>(s.dy[stage].at[token][at.inner]);
      if (SOFTPLUS) delta = softplus(delta);
      if (HAS_Z) {
        const float gate = widen<IN>(s.z[stage].at[token][at.inner]);
        d *= gate * sigmoid(gate);
      }
      delta = live ? delta : 0.f;
      span += delta;
      s.steps.put(g, at, delta, live ? d : 0.f);
    }
    __syncthreads();
#pragma unroll 2
    for (int g = GROUPS - 1; g >= 0; --g) {
      float delta[LANES], d[LANES];
      s.steps.get(g, at, delta, d);
#pragma unroll
      for (int k = LANES - 1; k >= 0; --k) {
        const float4 c4 = *(const float4*)&s.C[g * LANES + k][at.state];
        const float c[4] = {c4.x, c4.y, c4.z, c4.w};
        const bool start = HAS_RESET && s.marks[g * LANES + k] & 2;
        cut |= start;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          G[j] = exp2_(delta[k] * a2[j]) * fmaf(d[k], c[j], G[j]);
          if (HAS_RESET) G[j] = start ? 0.f : G[j];
        }
      }
    }
  }
  span += __shfl_xor_sync(~0u, span, 1);
  span += __shfl_xor_sync(~0u, span, 2);
  const i64 where = (at.batch * segments + at.segment) * dim + at.channel;
  write_states(ends + where * STATES, STATES, at.state, 0, at.there, G);
  if (at.there && at.lane == 0) spans[where] = cut ? ENDLESS : span;
}
