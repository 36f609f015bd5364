// MoM-GRU forward; forward.py has the same four phases a token. What is exchanged: h, what its products give the memory's programs, what
// these read, r∘h. M is in shared memory, rows PITCH apart, the weights in registers.

const int WANTED = cut(KNOWN + AFTER, PROGRAMS);  // rows that the memory's programs want
const int RH = cut(2 * COLUMNS + WANTED, 8), RC = cut(3 * COLUMNS, 8), RR = cut(COLUMNS, 8);  // tiles of 8 rows: with h, c, r∘h
const int READS = cut(NARROW, 16);  // chunks of c; as many warps share a product with it
const int AMONG = WARPS / READS;
// Floats in shared memory
const int AT_H = 0;
const int AT_C = AT_H + WARPS * SEQUENCES * apart(RH);
const int AT_R = AT_C + READS * SEQUENCES * apart(RC);
const int AT_GATES = AT_R + WARPS * SEQUENCES * apart(RR);
const int AT_VECTORS = AT_GATES + round4(BATCH * 2 * COLUMNS);  // key, query, e∘query, a, e; hidden
const int AT_SCORES = AT_VECTORS + 5 * NARROW + round4(HIDDEN);
const int AT_SHARES = AT_SCORES + 5 * LINES;
const int AT_READ = AT_SHARES + round4(BANKS);
const int AT_ROUTER = AT_READ + WARPS * SIDE * NARROW;
const int AT_MEMORY = round4(AT_ROUTER + BANKS * (HIDDEN + 1));
extern "C" __device__ const int shared_bytes = 4 * (AT_MEMORY + HOLDS * SLOTS * PITCH);

struct Exchange {
  float *h, *known, *later, *read, *reset_h;
};

// The bank `held` of this program: what the token before writes, what this one reads
DEVICE void remember(
    float* at, float* shared, int held, float (&share)[HOLDS], const Exchange& of, int t, int T, const float* drawn, const u8* reset,
    const u8* valid, const float* first, float* rho, float* memories) {
  const int me = thread(), warp = me / 32, lane = me % 32;
  const int which = held * PROGRAMS + (PROGRAMS - 1 - member()), b = which / BANKS, bank = which % BANKS;
  const unsigned parity = (t + 1) & 1;
  float *key = shared + AT_VECTORS, *query = key + NARROW, *both = query + NARROW, *add = both + NARROW, *erase = add + NARROW;
  float *hidden = erase + NARROW, *scores = shared + AT_SCORES, *shares = shared + AT_SHARES, *read = shared + AT_READ;
  const bool cut_here = HAS_RESET && t < T && reset[t * (i64)ALL + b];
  const bool write = t > 0 && !cut_here && (!HAS_VALID || valid[(t - 1) * (i64)ALL + b]);
  const float* known = of.known + b * KNOWN;
  const float* later = of.later + b * AFTER;
  if (cut_here) load_bank(at, first + bank * BANK);
  for (int m = me; m < NARROW; m += THREADS) {
    bool inside = m < WIDTH;
    float q = inside ? expect(known + HIDDEN + m, parity) : 0, k = inside ? expect(later + m, parity) : 0;
    float v = inside ? expect(later + WIDTH + m, parity) : 0;
    float e = sigmoid(ERASE == WIDTH ? v : inside ? expect(later + ERASE + m, parity) : 0);
    key[m] = k, query[m] = q, both[m] = e * q, add[m] = tanh_(v), erase[m] = e;
  }
  for (int i = THREADS - 1 - me; i < HIDDEN; i += THREADS) hidden[i] = expect(known + i, parity);
  const float gamma = sigmoid(expect(later + AFTER - 1, parity));
  sync();

  // scores of the slots, and of the banks
  {
    const int slot = me / GANG, part = me % GANG;
    float of_key = 0, of_query = 0, of_both = 0;
    if (slot < SLOTS)
      for (int m = part * 4; m < NARROW; m += GANG * 4) {
        float4 M = *(const float4*)(at + slot * PITCH + m), k = *(const float4*)(key + m);
        float4 q = *(const float4*)(query + m), eq = *(const float4*)(both + m);
        of_key += M.x * k.x + M.y * k.y + M.z * k.z + M.w * k.w;
        of_query += M.x * q.x + M.y * q.y + M.z * q.z + M.w * q.w;
        of_both += M.x * eq.x + M.y * eq.y + M.z * eq.z + M.w * eq.w;
      }
    for (int mask = GANG / 2; mask; mask /= 2) {
      of_key += from_lane(of_key, mask);
      of_query += from_lane(of_query, mask);
      of_both += from_lane(of_both, mask);
    }
    if (part == 0 && slot < LINES) scores[slot] = of_key, scores[LINES + slot] = of_query, scores[2 * LINES + slot] = of_both;
  }
  float query_add = 0;
  for (int m = lane; m < NARROW; m += 32) query_add += query[m] * add[m];
  query_add = warp_sum(query_add);
  for (int i = warp; i < BANKS; i += WARPS) {
    float y = 0;
    for (int u = lane; u < HIDDEN; u += 32) y += shared[AT_ROUTER + i * HIDDEN + u] * hidden[u];
    y = warp_sum(y) + shared[AT_ROUTER + BANKS * HIDDEN + i];
    if (HAS_DRAWN && t < T) y += drawn[(t * (i64)ALL + b) * BANKS + i];
    if (lane == 0) shares[i] = y;
  }
  sync();

  // each warp all softmaxes; it leaves what it needs of them itself
  float* own = scores + 3 * LINES;  // what is written to a slot, what is read of it
  {
    const float LOG2E = 1.4426950408889634f;
    float most = -number(0x7f800000), all = 0, mine = 0;
    for (int i = 0; i < BANKS; i++) most = fmaxf(most, shares[i]);
    for (int i = 0; i < BANKS; i++) {
      float e = exp2_((shares[i] - most) * LOG2E);
      all += e;
      if (i == bank) mine = e;
    }
    const float now = mine / all;
    float w[LINES / 32], s[LINES / 32], highest = -number(0x7f800000), sum = 0;
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      w[i] = i * 32 + lane < SLOTS ? scores[i * 32 + lane] : -number(0x7f800000);
      highest = fmaxf(highest, w[i]);
    }
    highest = warp_max(highest);
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) sum += w[i] = exp2_((w[i] - highest) * LOG2E);
    const float part = gamma * share[held] / warp_sum(sum);
    highest = -number(0x7f800000);
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      int slot = i * 32 + lane;
      w[i] *= part;
      s[i] = slot < SLOTS ? scores[LINES + slot] : -number(0x7f800000);
      if (write && slot < SLOTS) s[i] += w[i] * (query_add - scores[2 * LINES + slot]);
      highest = fmaxf(highest, s[i]);
    }
    highest = warp_max(highest);
    sum = 0;
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) sum += s[i] = exp2_((s[i] - highest) * LOG2E);
    sum = now / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      int slot = i * 32 + lane;
      if (slot / TURN == warp) own[slot] = w[i], own[LINES + slot] = s[i] * sum;
    }
    share[held] = now;
    if (KEEP && t < T && me == 0) rho[(t * (i64)ALL + b) * BANKS + bank] = now;
  }
  sync_warp();

  {
    const int m = lane % QUADS * 4, side = lane / QUADS;
    const float4 a = *(const float4*)(add + m), e = *(const float4*)(erase + m);
    float4 sum = make_float4(0, 0, 0, 0);
    const bool keep = KEEP && t < T && t % SEGMENT == 0;
    float* kept = memories + (t / SEGMENT * (i64)(ALL * BANKS) + which) * BANK;
    if (side < SIDE)
      for (int i = side; i < TURN; i += SIDE) {
        int slot = warp * TURN + i;
        if (slot >= SLOTS) break;
        float4 M = *(float4*)(at + slot * PITCH + m);
        if (write) {
          float w = own[slot];
          M.x += w * (a.x - e.x * M.x), M.y += w * (a.y - e.y * M.y), M.z += w * (a.z - e.z * M.z), M.w += w * (a.w - e.w * M.w);
          *(float4*)(at + slot * PITCH + m) = M;
        }
        if (keep) {
          float* to = kept + slot * WIDTH + m;
          if (WIDTH % 4 == 0)
            *(float4*)to = M;
          else {
            to[0] = M.x;
            if (m + 1 < WIDTH) to[1] = M.y;
            if (m + 2 < WIDTH) to[2] = M.z;
            if (m + 3 < WIDTH) to[3] = M.w;
          }
        }
        float s = own[LINES + slot];
        sum.x += s * M.x, sum.y += s * M.y, sum.z += s * M.z, sum.w += s * M.w;
      }
    if (side < SIDE) *(float4*)(read + (warp * SIDE + side) * NARROW + m) = sum;
  }
  sync();
  for (int m = me; m < NARROW; m += THREADS) {
    float y = 0;
    for (int i = 0; i < WARPS * SIDE; i++) y += read[i * NARROW + m];
    if (t < T || SETTLE) publish(of.read + which * NARROW + m, t < T ? y : 0, parity);
  }
}

// SETTLE: of one token. h' replaces the first h, and on residual [B, D] goes to out. What is exchanged ends with the bits of no token, so
// that the next call takes it for zeros: whoever has had h' of all columns knows that all have what came before.
// exchange: zeros, of each team [BATCH, WIDE | WIDE | BANKS · NARROW | KNOWN | AFTER], EXCHANGED in all
extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(
    float* h, float* M, const float* given, const float* drawn, const u8* reset, const u8* valid, const float* w_h, const float* w_c,
    const float* w_candidate, const float* w_after, const float* after_bias, const float* router, const float* router_bias,
    const float* first, float* before, float* rho, float* c, float* gates, float* candidate, float* later, float* memories,
    const void* residual, void* out, float* exchange, int T) {
  SHARED(shared);
  const int me = thread(), warp = me / 32, lane = me % 32;
  const int column = member() * COLUMNS, wanted = member() * WANTED;
  const bool owns = column < WIDE, gives = owns || wanted < KNOWN + AFTER;  // columns of h; rows of products with it
  float *sums_h = shared + AT_H, *sums_c = shared + AT_C, *sums_r = shared + AT_R, *of_gates = shared + AT_GATES;
  {  // of arrays [T, B, …] and [B, …] what follows this team's first sequence
    const i64 ours = team() * BATCH;
    h += ours * D, M += ours * BANKS * BANK, given += ours * GIVEN, drawn += ours * BANKS, reset += ours, valid += ours;
    before += ours * KNOWN, rho += ours * BANKS, c += ours * WIDTH, gates += ours * 2 * D, candidate += ours * D, later += ours * AFTER;
    memories += ours * BANKS * BANK;
  }
  const i64 before_ours = team() * (i64)BATCH * D;
  Exchange of;
  of.h = exchange + team() * EXCHANGED;
  of.reset_h = of.h + BATCH * WIDE;
  of.read = of.reset_h + BATCH * WIDE;
  of.known = of.read + BATCH * BANKS * NARROW;
  of.later = of.known + BATCH * KNOWN;

  // Rows of products: with h, r and ζ of the columns, then what the memory's programs want; with c, r, ζ and candidate
  Rows<RH, CHUNKS> by_h;
  Rows<RC, 1> by_c;
  Rows<RR, CHUNKS> by_r;
  by_h.load([&](int i, int k) {
    int gate = i / COLUMNS, j = column + i % COLUMNS, row = wanted + i - 2 * COLUMNS;
    if (k >= D) return 0.0f;
    if (gate < 2) return j < D ? w_h[(i64)(KNOWN + gate * D + j) * D + k] : 0;
    if (i >= 2 * COLUMNS + WANTED || row >= KNOWN + AFTER) return 0.0f;
    return row < KNOWN ? w_h[(i64)row * D + k] : w_after[(i64)(row - KNOWN) * D + k];
  }, warp, WARPS);
  by_c.load([&](int i, int k) {
    int j = column + i % COLUMNS;
    return i < 3 * COLUMNS && j < D && k < WIDTH ? w_c[(i64)(i / COLUMNS * D + j) * WIDTH + k] : 0;
  }, warp % READS, 1);
  by_r.load([&](int i, int k) { return i < COLUMNS && column + i < D && k < D ? w_candidate[(i64)(column + i) * D + k] : 0; }, warp, WARPS);

  for (int i = me; i < BANKS * (HIDDEN + 1); i += THREADS) shared[AT_ROUTER + i] = i < BANKS * HIDDEN ? router[i] : router_bias[i - BANKS * HIDDEN];
  float share[HOLDS];
#pragma unroll
  for (int held = 0; held < HOLDS; held++) {
    int which = held * PROGRAMS + (PROGRAMS - 1 - member());
    share[held] = 0;
    if (which < BATCH * BANKS) load_bank(shared + AT_MEMORY + held * SLOTS * PITCH, M + (i64)which * BANK);
  }

  // What a thread has of the products: rows with h, and columns
  const int OF_H = cut((2 * COLUMNS + WANTED) * BATCH, THREADS), OWN = cut(COLUMNS * BATCH, THREADS);
  float next[OF_H], drawn_in[OWN], old[OWN], zeta[OWN], inner[OWN];
  auto load_given = [&](int t) {
#pragma unroll
    for (int n = 0; n < OF_H; n++) {
      int o = me + n * THREADS, i = o % (2 * COLUMNS + WANTED), b = o / (2 * COLUMNS + WANTED), j = column + i % COLUMNS;
      int k = i < 2 * COLUMNS ? KNOWN + i / COLUMNS * D + j : wanted + i - 2 * COLUMNS;
      bool there = b < BATCH && t < T && (i < 2 * COLUMNS ? j < D : k < KNOWN);
      next[n] = there ? given[(t * (i64)ALL + b) * GIVEN + k] : 0;
      if (b < BATCH && i >= 2 * COLUMNS && k >= KNOWN && k < KNOWN + AFTER) next[n] = after_bias[k - KNOWN];
    }
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      int o = me + n * THREADS, j = column + o % COLUMNS, b = o / COLUMNS;
      drawn_in[n] = b < BATCH && j < D && t < T ? given[(t * (i64)ALL + b) * GIVEN + KNOWN + 2 * D + j] : 0;
    }
  };
#pragma unroll
  for (int n = 0; n < OWN; n++) {
    int o = me + n * THREADS, j = column + o % COLUMNS, b = o / COLUMNS;
    old[n] = b < BATCH && j < D ? h[b * D + j] : 0;
    if (b < BATCH && j < WIDE) publish(of.h + b * WIDE + j, old[n], 1);
  }
  load_given(0);
  sync();

  const float scale = 1 / sqrtf(float(WIDTH));
  for (int t = 0; t <= T; t++) {
    const unsigned parity = (t + 1) & 1;
    const i64 now = t * (i64)ALL, last = now - ALL;
    if (gives) product(by_h, of.h, WIDE, warp, WARPS, WIDE, parity, sums_h + warp * SEQUENCES * apart(RH));
    sync();
#pragma unroll
    for (int n = 0; n < OF_H; n++) {
      int o = me + n * THREADS, i = o % (2 * COLUMNS + WANTED), b = o / (2 * COLUMNS + WANTED), k = wanted + i - 2 * COLUMNS;
      if (b >= BATCH || !gives) break;
      float y = total<RH>(sums_h, b, i, WARPS);
      bool kept = !HAS_RESET || t == T || !reset[now + b];  // a product with h, which a reset makes 0
      if (i < 2 * COLUMNS)
        of_gates[b * 2 * COLUMNS + i] = next[n] + (kept ? y : 0);
      else if (k < KNOWN) {
        y = next[n] + (kept ? y : 0);
        y = k >= HIDDEN ? y * scale : y <= 0 ? 0 : y;
        publish(of.known + b * KNOWN + k, y, parity);
        if (KEEP && t < T) before[(now + b) * KNOWN + k] = y;
      } else if (k < KNOWN + AFTER) {
        k -= KNOWN;
        y += next[n];
        if (k < WIDTH) y *= scale;
        publish(of.later + b * AFTER + k, y, parity);
        if (KEEP && t > 0) later[(last + b) * AFTER + k] = y;
      }
    }
#pragma unroll
    for (int held = 0; held < HOLDS; held++)
      if (held * PROGRAMS + (PROGRAMS - 1 - member()) < BATCH * BANKS)
        remember(shared + AT_MEMORY + held * SLOTS * PITCH, shared, held, share, of, t, T, drawn, reset, valid, first, rho, memories);
    if (SETTLE && t == T && owns)
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        int o = me + n * THREADS, j = column + o % COLUMNS, b = o / COLUMNS;
        if (b < BATCH && j < WIDE) publish(of.reset_h + b * WIDE + j, 0, parity);
      }
    if (t == T) break;
    if (!owns) {
      load_given(t + 1);
      sync();
      continue;
    }

    if (warp < READS * AMONG)
      for (int tile = warp / READS; tile < TILES; tile += AMONG) {
        const int m = warp % READS * 16 + lane % 4 * 4;
        float4 v[2][1] = {};
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const int b = tile * 16 + n * 8 + lane / 4;
          if (b < BATCH && m < NARROW) v[n][0] = expect4<BANKS, NARROW>(of.read + b * BANKS * NARROW + m, parity);
          if (KEEP && member() == 0 && b < BATCH) {
            float all[4] = {v[n][0].x, v[n][0].y, v[n][0].z, v[n][0].w};
            for (int e = 0; e < 4; e++)
              if (m + e < WIDTH) c[(now + b) * WIDTH + m + e] = all[e];
          }
        }
        sync_warp();
        multiply(by_c, v, sums_c + (warp % READS * SEQUENCES + tile * 16) * apart(RC));
      }
    sync();
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      int o = me + n * THREADS, i = o % COLUMNS, j = column + i, b = o / COLUMNS;
      if (b >= BATCH || j >= WIDE) continue;
      if (HAS_RESET && reset[now + b]) old[n] = 0;
      float r = of_gates[b * 2 * COLUMNS + i] + total<RC>(sums_c, b, i, READS);
      publish(of.reset_h + b * WIDE + j, sigmoid(r) * old[n], parity);
      zeta[n] = of_gates[b * 2 * COLUMNS + COLUMNS + i] + total<RC>(sums_c, b, COLUMNS + i, READS);
      inner[n] = drawn_in[n] + total<RC>(sums_c, b, 2 * COLUMNS + i, READS);
      if (KEEP && j < D) gates[(now + b) * 2 * D + j] = r, gates[(now + b) * 2 * D + D + j] = zeta[n];
    }
    load_given(t + 1);
    product(by_r, of.reset_h, WIDE, warp, WARPS, WIDE, parity, sums_r + warp * SEQUENCES * apart(RR));
    sync();
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      int o = me + n * THREADS, i = o % COLUMNS, j = column + i, b = o / COLUMNS;
      if (b >= BATCH || j >= WIDE) continue;
      float x = inner[n] + total<RR>(sums_r, b, i, WARPS);
      float y = sigmoid(zeta[n]) * old[n] + sigmoid(-zeta[n]) * tanh_(x);  // 1 − ζ keeps its digits
      if (!HAS_VALID || valid[now + b]) old[n] = j < D ? y : 0;
      publish(of.h + b * WIDE + j, old[n], parity ^ 1);
      if (j < D) h[(SETTLE ? b : now + ALL + b) * D + j] = old[n];
      if (SETTLE && j < D) {
        const i64 place = before_ours + b * D + j;
        float sum = rounded<SETTLE>(old[n]);
        if (residual) sum += load_as<SETTLE>(residual, place);
        store_as<SETTLE>(out, place, sum);
      }
      if (KEEP && j < D) candidate[(now + b) * D + j] = x;
    }
  }
#pragma unroll
  for (int held = 0; held < HOLDS; held++) {
    int which = held * PROGRAMS + (PROGRAMS - 1 - member());
    if (which < BATCH * BANKS)
      for (int i = me; i < BANK; i += THREADS) M[(i64)which * BANK + i] = shared[AT_MEMORY + held * SLOTS * PITCH + i / WIDTH * PITCH + i % WIDTH];
  }
}
