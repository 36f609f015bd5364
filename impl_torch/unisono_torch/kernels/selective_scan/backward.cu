// All gradients; backward.py has their equations. Tiles are taken from the last to the first. From the state saved before a tile, the
// state before each group of four tokens is kept in shared memory; each group is then computed once more with its states and decays in
// registers, and swept back.
//
// dB and dC are sums over channels. A lane holds state j of its four in slot j ^ (channel mod 4), so that lanes of neighbouring channels
// exchange slots of one state with each other without choosing among registers; what a warp has summed takes the place of the group's kept
// state, and a tile ends with the sum over warps. dBC [B, blocks, tiles, 8 groups, (C, B), 4, 4, 4 tokens]: state q*4 + m at [m][q].
// dA [B, segments, D, 16] and dD [B, segments, D] are a segment's.

constexpr int STAGES = 2;

struct Backward {
  Tile<In> u[STAGES], z[STAGES];
  Tile<Step> dt[STAGES];
  Tile<Out> dy[STAGES];
  float B[TOKENS][4][STATES], C[TOKENS][4][STATES];  // in the order of each slot
  Steps steps;
  float4 dys[GROUPS][CHANNELS];  // dy with the gate, of four tokens
  float4 kept[GROUPS][THREADS];
  u8 marks[2][TOKENS];
};
extern "C" __device__ const int shared_bytes = sizeof(Backward);

// The sum over channels c, c ^ 1, c ^ 2, c ^ 3 of the state in slot 0.
__device__ __forceinline__ float over_channels(const float v[4]) {
  float a = v[0] + __shfl_xor_sync(~0u, v[2], 8), b = v[1] + __shfl_xor_sync(~0u, v[3], 8);
  return a + __shfl_xor_sync(~0u, b, 4);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) scan(
    const In* u, const Step* dt, const float* A, const Row* B, const Row* C, const float* D, const In* z, const u8* reset, const u8* valid,
    const float* saved, const Out* dy, const float* dfinal, In* du, Step* ddt, In* dz, float* dA, float* dBC, float* dD, float* dinitial,
    const float* ends, const float* spans, int T, int dim, int segments, int tiles, int u_row, int dt_row, int z_row, int b_row, int c_row) {
  extern __shared__ float4 memory[];
  Backward& s = *(Backward*)memory;
  const Place at = place(dim, segments);
  const int low = at.segment * tiles, count = (T + TOKENS - 1) / TOKENS, high = min(low + tiles, count);
  const int swap = at.inner & 3, blocks = (dim + CHANNELS - 1) / CHANNELS;
  const bool second = at.inner & 4;
  const i64 channel = at.batch * dim + at.channel;
  float a2[4], G[4], to_A[4] = {0.f, 0.f, 0.f, 0.f}, to_D = 0.f, skip = at.there ? D[at.channel] : 0.f;
  read_states(A + i64(at.channel) * N, N, at.state, swap, at.there, a2);
#pragma unroll
  for (int j = 0; j < 4; ++j) a2[j] *= LOG2E;
  read_states(dfinal + channel * N, N, at.state, swap, at.there, G);
  for (int after = segments - 1; after > at.segment; --after) carry(G, ends, spans, at.batch * segments + after, at, dim, a2, swap);

  Held held_b, held_c;
  float entering[4];
  auto bring = [&](int tile) {  // with what goes through registers
    const int stage = (tile + STAGES) % STAGES, t = tile < low ? T : tile * TOKENS;
    fetch(s.u[stage], u, at, t, T, u_row, dim);
    fetch(s.dt[stage], dt, at, t, T, dt_row, dim);
    if (HAS_Z) fetch(s.z[stage], z, at, t, T, z_row, dim);
    fetch(s.dy[stage], dy, at, t, T, dim, dim);
    commit();
    held_b = hold(B, valid, at, t, T, b_row);
    held_c = hold(C, valid, at, t, T, c_row);
    load4(saved + ((at.batch * count + tile) * dim + at.channel) * STATES + at.state, swap, at.there && tile >= low, entering);
  };
  bring(high - 1);
  u8 marked = mark(reset, valid, at, (high - 1) * TOKENS, T);

  for (int tile = high - 1; tile >= low; --tile) {
    const int top = tile * TOKENS, stage = tile % STAGES;
    arrived<0>();
    __syncthreads();  // the tile is there, and nobody reads the one after it any more
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      put4(&s.B[at.tid / LANES][m][at.state], held_b, m);
      put4(&s.C[at.tid / LANES][m][at.state], held_c, m);
    }
    if (at.tid < TOKENS) s.marks[0][at.tid] = marked;
    float h[4] = {entering[0], entering[1], entering[2], entering[3]};
    bring(tile - 1);
    if (HAS_RESET || HAS_VALID) marked = mark(reset, valid, at, tile > low ? top - TOKENS : T, T);
    if (HAS_VALID) __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int token = g * LANES + at.lane;
      const bool live = HAS_VALID ? s.marks[0][token] & 1 : top + token < T;
      float delta = widen<STEP>(s.dt[stage].at[token][at.inner]), x = widen<IN>(s.u[stage].at[token][at.inner]);
      float d = widen<OUT>(s.dy[stage].at[token][at.inner]);
      if (SOFTPLUS) delta = softplus(delta);
      if (HAS_Z) {
        const float gate = widen<IN>(s.z[stage].at[token][at.inner]);
        d *= gate * sigmoid(gate);
      }
      delta = live ? delta : 0.f;
      s.steps.put(g, at, delta, live ? delta * x : 0.f);
      ((float*)&s.dys[g][at.inner])[at.lane] = live ? d : 0.f;
    }
    __syncthreads();

#pragma unroll 1
    for (int g = 0; g < GROUPS; ++g) {
      s.kept[g][at.tid] = make_float4(h[0], h[1], h[2], h[3]);
      if (g == GROUPS - 1) break;
      float delta[LANES], gain[LANES];
      s.steps.get(g, at, delta, gain);
#pragma unroll
      for (int k = 0; k < LANES; ++k) {
        const float4 b4 = *(const float4*)&s.B[g * LANES + k][swap][at.state];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w};
        const bool start = HAS_RESET && s.marks[0][g * LANES + k] & 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float before = exp2_(delta[k] * a2[j]) * h[j];
          if (HAS_RESET) before = start ? 0.f : before;
          h[j] = fmaf(gain[k], b[j], before);
        }
      }
    }

#pragma unroll 1
    for (int g = GROUPS - 1; g >= 0; --g) {
      float delta[LANES], gain[LANES], b[LANES][4], decay[LANES][4], states[LANES + 1][4];
      bool start[LANES];
      s.steps.get(g, at, delta, gain);
      const float4 kept = s.kept[g][at.tid], d4 = s.dys[g][at.inner];
      const float d[LANES] = {d4.x, d4.y, d4.z, d4.w};
      states[0][0] = kept.x, states[0][1] = kept.y, states[0][2] = kept.z, states[0][3] = kept.w;
#pragma unroll
      for (int k = 0; k < LANES; ++k) {
        const float4 b4 = *(const float4*)&s.B[g * LANES + k][swap][at.state];
        b[k][0] = b4.x, b[k][1] = b4.y, b[k][2] = b4.z, b[k][3] = b4.w;
        start[k] = HAS_RESET && s.marks[0][g * LANES + k] & 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          decay[k][j] = exp2_(delta[k] * a2[j]);
          float before = decay[k][j] * states[k][j];
          if (HAS_RESET) before = start[k] ? 0.f : before;
          states[k + 1][j] = fmaf(gain[k], b[k][j], before);
        }
      }
      float outs[LANES], to_gain[LANES], to_delta[LANES], sums_b[LANES], sums_c[LANES];
#pragma unroll
      for (int k = LANES - 1; k >= 0; --k) {
        const float4 c4 = *(const float4*)&s.C[g * LANES + k][swap][at.state];
        const float c[4] = {c4.x, c4.y, c4.z, c4.w};
        float from_b[4], from_c[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float full = fmaf(d[k], c[j], G[j]);
          from_c[j] = d[k] * states[k + 1][j];
          from_b[j] = gain[k] * full;
          float back = decay[k][j] * full, W = back * states[k][j];
          if (HAS_RESET) back = start[k] ? 0.f : back, W = start[k] ? 0.f : W;
          G[j] = back;
          to_A[j] = fmaf(delta[k], W, to_A[j]);
          outs[k] = j ? fmaf(states[k + 1][j], c[j], outs[k]) : states[k + 1][j] * c[j];
          to_gain[k] = j ? fmaf(full, b[k][j], to_gain[k]) : full * b[k][j];
          to_delta[k] = j ? fmaf(W, a2[j], to_delta[k]) : W * a2[j];
        }
        sums_b[k] = over_channels(from_b), sums_c[k] = over_channels(from_c);
      }
      float4 sum;
      float* sums = (float*)&sum;
#pragma unroll
      for (int k = 0; k < LANES; ++k)
        sums[k] = (second ? sums_b[k] : sums_c[k]) + __shfl_xor_sync(~0u, second ? sums_c[k] : sums_b[k], 16);
      s.kept[g][at.tid] = sum;

      const int token = g * LANES + at.lane, t = top + token;
      const bool live = HAS_VALID ? s.marks[0][token] & 1 : true;
      const i64 where = (at.batch * T + t) * dim + at.channel;
      const float raw = widen<STEP>(s.dt[stage].at[token][at.inner]), own = s.steps.own(g, at);
      const float x = live ? widen<IN>(s.u[stage].at[token][at.inner]) : 0.f;
      float dout = widen<OUT>(s.dy[stage].at[token][at.inner]), gated = dout;
      const float out = HAS_Z ? fmaf(skip, x, scattered(outs, at.lane)) : 0.f, gains = scattered(to_gain, at.lane);
      float deltas = fmaf(gains, x, LN2 * scattered(to_delta, at.lane)), to_z = 0.f;
      if (HAS_Z) {
        const float gate = widen<IN>(s.z[stage].at[token][at.inner]), sigma = sigmoid(gate);
        gated = dout * gate * sigma;
        to_z = dout * out * sigma * fmaf(gate, 1.f - sigma, 1.f);
      }
      if (SOFTPLUS) deltas *= sigmoid(raw);
      to_D += live ? gated * x : 0.f;
      if (at.there && t < T) {
        du[where] = narrow<IN>(live ? fmaf(gains, own, skip * gated) : 0.f);
        ddt[where] = narrow<STEP>(live ? deltas : 0.f);
        if (HAS_Z) dz[where] = narrow<IN>(live ? to_z : 0.f);
      }
    }
    __syncthreads();
    float4* to = (float4*)(dBC + ((at.batch * blocks + at.block) * count + tile) * i64(2 * TOKENS * STATES));
#pragma unroll
    for (int g = 0; g < GROUPS; g += WARPS) {
      const int i = g * 32 + at.tid;
      float4 sum = s.kept[i / 32][i % 32];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) {
        const float4 more = s.kept[i / 32][w * 32 + i % 32];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      to[i] = sum;
    }
  }
  const i64 mine = (at.batch * segments + at.segment) * dim + at.channel;
  write_states(dA + mine * STATES, STATES, at.state, swap, at.there, to_A);
  to_D += __shfl_xor_sync(~0u, to_D, 1);
  to_D += __shfl_xor_sync(~0u, to_D, 2);
  if (at.there && at.lane == 0) dD[mine] = to_D;
  if (at.segment == 0) write_states(dinitial + channel * N, N, at.state, swap, at.there, G);
}
