// The gradients of A, B, C and D, added from what backward.cu leaves of each block of channels and each segment, one after the other.
//
// A program of the first B * count adds a tile's dBC over blocks, float4 by float4: four tokens of a state. The others add dA and dD over
// sequences and segments, a thread four states of a channel.

extern "C" __device__ const int shared_bytes = 0;

__device__ __forceinline__ void add(float4& sum, const float4 more) {
  sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
}

extern "C" __global__ void __launch_bounds__(THREADS) scan(
    const float* dBC, const float* dA, const float* dD, Row* dB, Row* dC, float* to_A, float* to_D, int T, int dim, int batch, int segments) {
  constexpr int WHOLE = 2 * TOKENS * STATES / 4, EACH = WHOLE / THREADS;  // float4 of a tile, and of a thread
  const int blocks = (dim + CHANNELS - 1) / CHANNELS, count = (T + TOKENS - 1) / TOKENS, tid = threadIdx.x;
  const i64 program = blockIdx.x;
  if (program < i64(batch) * count) {
    const i64 sequence = program / count, tile = program % count;
    const float4* from = (const float4*)dBC + (sequence * blocks * count + tile) * WHOLE + tid;
    float4 sums[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) sums[e] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) add(sums[e], from[i64(block) * count * WHOLE + e * THREADS]);
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {  // [groups, (C, B), 4, 4]: state q * 4 + m at [m][q]
      const int i = e * THREADS + tid, state = i % 4 * 4 + i / 4 % 4, first = int(tile) * TOKENS + i / 32 * LANES;
      const float of[LANES] = {sums[e].x, sums[e].y, sums[e].z, sums[e].w};
      Row* to = (i / 16 % 2 ? dB : dC) + (sequence * T + first) * N + state;
#pragma unroll
      for (int k = 0; k < LANES; ++k)
        if (state < N && first + k < T) to[k * N] = narrow<BC>(of[k]);
    }
    return;
  }
  const i64 i = (program - i64(batch) * count) * THREADS + tid, channel = i / 4;
  const int state = i % 4 * 4;
  if (channel >= dim) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  float skip = 0.f;
  for (i64 part = 0; part < i64(batch) * segments; ++part) {
    add(sum, ((const float4*)dA)[part * dim * (STATES / 4) + i]);
    if (state == 0) skip += dD[part * dim + channel];
  }
  const float of[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (state + j < N) to_A[channel * N + state + j] = of[j];
  if (state == 0) to_D[channel] = skip;
}
