// y, the final state and, with SAVE, the state before each tile; with ENDS, only what a segment of `tiles` makes of a state of 0.
// saved [B, tiles in all, D, 16]; ends [B, segments, D, 16] and spans [B, segments, D].

constexpr int STAGES = 3;

struct Forward {
  Tile<In> u[STAGES], z[STAGES];
  Tile<Step> dt[STAGES];
  float B[TOKENS][STATES], C[TOKENS][STATES];
  Steps steps;
  u8 marks[2][TOKENS];
};

extern "C" __device__ const int shared_bytes = sizeof(Forward);

extern "C" __global__ void __launch_bounds__(THREADS, 3) scan(
    const In* u, const Step* dt, const float* A, const Row* B, const Row* C, const float* D, const In* z, const float* initial, const u8* reset,
    const u8* valid, Out* y, float* final, float* saved, float* ends, float* spans, int T, int dim, int segments, int tiles, int u_row,
    int dt_row, int z_row, int b_row, int c_row) {
  extern __shared__ float4 memory[];
  Forward& s = *(Forward*)memory;
  const Place at = place(dim, segments);
  const int low = at.segment * tiles, count = (T + TOKENS - 1) / TOKENS, high = min(low + tiles, count);
  float a2[4], h[4], skip = at.there ? D[at.channel] : 0.f, span = 0.f;
  read_states(A + i64(at.channel) * N, N, at.state, 0, at.there, a2);
#pragma unroll
  for (int j = 0; j < 4; ++j) a2[j] *= LOG2E;
  const i64 channel = at.batch * dim + at.channel;
  if (ENDS) {
    h[0] = h[1] = h[2] = h[3] = 0.f;
  } else {
    read_states(initial + channel * N, N, at.state, 0, at.there, h);
    for (int before = 0; before < at.segment; ++before) carry(h, ends, spans, at.batch * segments + before, at, dim, a2, 0);
  }
  bool cut = false;
  Held held_b, held_c = Held();
  auto bring = [&](int tile) {
    int stage = tile % STAGES, t = tile < high ? tile * TOKENS : T;
    fetch(s.u[stage], u, at, t, T, u_row, dim);
    fetch(s.dt[stage], dt, at, t, T, dt_row, dim);
    if (HAS_Z && !ENDS) fetch(s.z[stage], z, at, t, T, z_row, dim);
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) bring(low + i);
  held_b = hold(B, valid, at, low * TOKENS, T, b_row);
  if (!ENDS) held_c = hold(C, valid, at, low * TOKENS, T, c_row);
  if (at.tid < TOKENS) s.marks[low % 2][at.tid] = mark(reset, valid, at, low * TOKENS, T);
  u8 marked = mark(reset, valid, at, (low + 1) * TOKENS, T);

  for (int tile = low; tile < high; ++tile) {
    const int top = tile * TOKENS, stage = tile % STAGES;
    arrived<STAGES - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one before it any more
    put4(&s.B[at.tid / LANES][at.state], held_b, 0);
    if (!ENDS) put4(&s.C[at.tid / LANES][at.state], held_c, 0);
    if (at.tid < TOKENS) s.marks[(tile + 1) % 2][at.tid] = marked;
    bring(tile + STAGES - 1);
    held_b = hold(B, valid, at, top + TOKENS, T, b_row);
    if (!ENDS) held_c = hold(C, valid, at, top + TOKENS, T, c_row);
    if (HAS_RESET || HAS_VALID) marked = mark(reset, valid, at, top + 2 * TOKENS, T);
    if (SAVE && at.there)
      *(float4*)(saved + ((at.batch * count + tile) * dim + at.channel) * STATES + at.state) = make_float4(h[0], h[1], h[2], h[3]);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int token = g * LANES + at.lane;
      bool live = HAS_VALID ? s.marks[tile % 2][token] & 1 : top + token < T;
      float delta = widen<STEP>(s.dt[stage].at[token][at.inner]), x = widen<IN>(s.u[stage].at[token][at.inner]);
      if (SOFTPLUS) delta = softplus(delta);
      delta = live ? delta : 0.f;
      if (ENDS) span += delta;
      s.steps.put(g, at, delta, live ? delta * x : 0.f);
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float sums[LANES], delta[LANES], gain[LANES];
      s.steps.get(g, at, delta, gain);
#pragma unroll
      for (int k = 0; k < LANES; ++k) {
        const int token = g * LANES + k;
        const float4 b4 = *(const float4*)&s.B[token][at.state];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w};
        const bool start = HAS_RESET && s.marks[tile % 2][token] & 2;
        if (ENDS) cut |= start;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float held = exp2_(delta[k] * a2[j]) * h[j];
          if (HAS_RESET) held = start ? 0.f : held;
          h[j] = fmaf(gain[k], b[j], held);
        }
        if (!ENDS) {
          const float4 c = *(const float4*)&s.C[token][at.state];
          sums[k] = fmaf(h[3], c.w, fmaf(h[2], c.z, fmaf(h[1], c.y, h[0] * c.x)));
        }
      }
      if (!ENDS) {
        const int token = g * LANES + at.lane;
        bool live = HAS_VALID ? s.marks[tile % 2][token] & 1 : true;
        float x = widen<IN>(s.u[stage].at[token][at.inner]);
        float out = fmaf(skip, live ? x : 0.f, scattered(sums, at.lane));
        if (HAS_Z) {
          float gate = widen<IN>(s.z[stage].at[token][at.inner]);
          out *= live ? gate * sigmoid(gate) : 0.f;
        }
        if (at.there && top + token < T) y[(at.batch * T + top + token) * i64(dim) + at.channel] = narrow<OUT>(out);
      }
    }
  }
  if (ENDS) {
    span += __shfl_xor_sync(~0u, span, 1);
    span += __shfl_xor_sync(~0u, span, 2);
    const i64 where = (at.batch * segments + at.segment) * dim + at.channel;
    write_states(ends + where * STATES, STATES, at.state, 0, at.there, h);
    if (at.there && at.lane == 0) spans[where] = cut ? ENDLESS : span;
  } else if (high == count) {
    write_states(final + channel * N, N, at.state, 0, at.there, h);
  }
}
