// MoM-GRU's way back; backward.py has the same four phases a token. What is exchanged: gradients of what the memory read and wrote, of ζ
// and the candidate, of r, of c. G, the gradient of M, is in shared memory with M before this token and before the one before it.
//
// What the memory's gradient needs of c's is linear in it: all else is there before c's arrives.

const int OF_C = cut(WIDTH, PROGRAMS);  // c's components of a program
const int ROWS = COLUMNS + OF_C, RT = cut(ROWS, 8), RV = cut(COLUMNS, 8);
const int SEPARATE = AFTER > 2 * WIDTH + 1;
const int KINDS = SEPARATE ? 4 : 3;  // gradients of query, key, value(, erase)
const int LAST = KINDS * NARROW;  // then: γ, ρ
const int PIECE = LAST + 4;
const int VECTOR = PIECE + round4(HIDDEN);  // of a sequence: the sum of its banks' pieces, but γ's alone of the last four; hidden
const int CHUNKS_V = cut(cut(VECTOR, 16), WARPS);
const int STATES = SLOTS * PITCH;
const int QUAD_BANK = SLOTS * NARROW;  // a bank in `past`

// Floats in shared memory
const int AT_V = 0;
const int AT_C = AT_V + WARPS * SEQUENCES * apart(RV);
const int AT_Z = AT_C + WARPS * SEQUENCES * apart(RT);
const int AT_R = AT_Z + WARPS * SEQUENCES * apart(RT);
const int AT_VECTORS = AT_R + WARPS * SEQUENCES * apart(RT);  // key, query, a, e, e∘query, c's gradient, e∘ it
const int AT_SCORES = AT_VECTORS + 7 * NARROW;
const int AT_READ = AT_SCORES + 8 * LINES;
const int AT_ROUTER = AT_READ + WARPS * SIDE * 4 * NARROW;
const int AT_MEMORY = round4(AT_ROUTER + BANKS * HIDDEN);
extern "C" __device__ const int shared_bytes = 4 * (AT_MEMORY + HOLDS * 3 * STATES);

struct Kept {
  const float *before, *rho, *later, *memories, *first;
  const u8 *reset, *valid;
};

DEVICE float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// The sum over a slot's threads
DEVICE float ganged(float x) {
  for (int mask = GANG / 2; mask; mask /= 2) x += from_lane(x, mask);
  return x;
}

// Its softmax in place: a slot in 32 a lane
DEVICE void softmax(float (&s)[LINES / 32]) {
  float most = -number(0x7f800000), sum = 0;
#pragma unroll
  for (int i = 0; i < LINES / 32; i++) {
    if (i * 32 + thread() % 32 >= SLOTS) s[i] = -number(0x7f800000);
    most = fmaxf(most, s[i]);
  }
  most = warp_max(most);
#pragma unroll
  for (int i = 0; i < LINES / 32; i++) sum += s[i] = exp2_((s[i] - most) * 1.4426950408889634f);
  sum = 1 / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < LINES / 32; i++) s[i] *= sum;
}

// What a token writes, as a thread loads it: component me % NARROW
struct Written {
  float key, value, erase, rho, gamma;

  DEVICE void load(const Kept& kept, i64 row, int bank) {
    const float* at = kept.later + row * AFTER;
    const bool inside = thread() < WIDTH;
    key = inside ? at[thread()] : 0, value = inside ? at[WIDTH + thread()] : 0, erase = inside ? at[ERASE + thread()] : 0;
    rho = kept.rho[row * BANKS + bank], gamma = at[AFTER - 1];
  }
  DEVICE void store(float* keys, float* adds, float* erases) const {
    if (thread() < NARROW) keys[thread()] = key, adds[thread()] = tanh_(value), erases[thread()] = sigmoid(erase);
  }
};

// The memories before tokens start to u into `past`, the last into `at`, too
DEVICE void remake(float* at, float* shared, const Kept& kept, float* past, int which, int start, int u) {
  const int me = thread(), warp = me / 32, lane = me % 32, b = which / BANKS, bank = which % BANKS;
  float *key = shared + AT_VECTORS, *add = key + 2 * NARROW, *erase = add + NARROW, *scores = shared + AT_SCORES;
  load_bank(at, kept.memories + (start / SEGMENT * (i64)(ALL * BANKS) + which) * BANK);
  Written next;
  next.load(kept, start * (i64)ALL + b, bank);
  for (int s = start; s <= u; s++) {
    const i64 row = s * (i64)ALL + b;
    const bool write = s < u && (!HAS_VALID || kept.valid[row]);
    const float share = next.rho * sigmoid(next.gamma);
    sync();
    if (HAS_RESET && kept.reset[row]) load_bank(at, kept.first + bank * BANK);
    next.store(key, add, erase);
    if (s < u) next.load(kept, row + ALL, bank);
    sync();
    const int slot = me / GANG, part = me % GANG;
    float of_key = 0;
    if (slot < SLOTS)
      for (int m = part * 4; m < NARROW; m += GANG * 4) of_key += dot4(*(const float4*)(at + slot * PITCH + m), *(const float4*)(key + m));
    of_key = ganged(of_key);
    if (part == 0 && slot < LINES) scores[slot] = of_key;
    sync();
    float w[LINES / 32];
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) w[i] = scores[i * 32 + lane];
    softmax(w);
    float* own = scores + LINES;
#pragma unroll
    for (int i = 0; i < LINES / 32; i++)
      if ((i * 32 + lane) / TURN == warp) own[i * 32 + lane] = w[i] * share;
    sync_warp();
    float* to = past + ((i64)(s - start) * ALL * BANKS + which) * QUAD_BANK;
    const int m = lane % QUADS * 4, side = lane / QUADS;
    const float4 a = *(const float4*)(add + m), e = *(const float4*)(erase + m);
    if (side < SIDE)
      for (int i = side; i < TURN && warp * TURN + i < SLOTS; i += SIDE) {
        int line = warp * TURN + i;
        float4 M = *(float4*)(at + line * PITCH + m);
        *(float4*)(to + line * NARROW + m) = M;
        if (write) {
          float x = own[line];
          M.x += x * (a.x - e.x * M.x), M.y += x * (a.y - e.y * M.y), M.z += x * (a.z - e.z * M.z), M.w += x * (a.w - e.w * M.w);
          *(float4*)(at + line * PITCH + m) = M;
        }
      }
  }
  sync();
}

// A bank `held` of this program at token t, from `now` the memory before it, and u = t − 1, from `old`
DEVICE void recall(
    float* G, float* now, float* old, float* shared, int which, const Kept& kept, float* past, const float* dc, float* pieces,
    float* dfresh, float& share_before, int t, int T, unsigned parity) {
  const int me = thread(), warp = me / 32, lane = me % 32, b = which / BANKS, bank = which % BANKS, u = t - 1;
  const i64 row = t * (i64)ALL + b, last = row - ALL;
  const bool reads = t < T, writes = t > 0;
  const bool cuts = HAS_RESET && reads && kept.reset[row];
  const bool silent = cuts || !writes || (HAS_VALID && !kept.valid[last]);
  float *key = shared + AT_VECTORS, *query = key + NARROW, *add = query + NARROW, *erase = add + NARROW, *both = erase + NARROW;
  float *of_c = both + NARROW, *erased = of_c + NARROW, *scores = shared + AT_SCORES, *read = shared + AT_READ;
  const float scale = 1 / sqrtf(float(WIDTH));
  if (writes && (t == T || t % SEGMENT == 0)) remake(old, shared, kept, past, which, u / SEGMENT * SEGMENT, u);

  Written written = {0, 0, 0, 0, 0};
  if (writes) written.load(kept, last, bank);
  written.store(key, add, erase);
  if (me < NARROW) {
    query[me] = reads && me < WIDTH ? kept.before[row * KNOWN + HIDDEN + me] : 0;
    both[me] = erase[me] * query[me];
  }
  const float rho = reads ? kept.rho[row * BANKS + bank] : 0, gamma = reads ? sigmoid(kept.later[row * AFTER + AFTER - 1]) : 0;
  const int slot = me / GANG, part = me % GANG;
  arrived();  // `old`
  sync();
  {
    float of_query = 0, of_key = 0, of_G = 0, of_both = 0;
    if (slot < SLOTS)
      for (int m = part * 4; m < NARROW; m += GANG * 4) {
        const int at = slot * PITCH + m;
        float4 g = *(const float4*)(G + at), a = *(const float4*)(add + m);
        if (reads) of_query += dot4(*(const float4*)(now + at), *(const float4*)(query + m));
        if (writes) {
          float4 M = *(const float4*)(old + at), e = *(const float4*)(erase + m);
          of_key += dot4(M, *(const float4*)(key + m));
          of_both += dot4(M, *(const float4*)(both + m));
          of_G += dot4(g, a) - dot4(make_float4(g.x * M.x, g.y * M.y, g.z * M.z, g.w * M.w), e);
        }
      }
    of_query = ganged(of_query), of_key = ganged(of_key), of_G = ganged(of_G), of_both = ganged(of_both);
    if (part == 0 && slot < LINES)
      scores[slot] = of_query, scores[LINES + slot] = of_key, scores[2 * LINES + slot] = of_G, scores[3 * LINES + slot] = of_both;
  }
  sync();
  float alpha[LINES / 32], beta[LINES / 32];
#pragma unroll
  for (int i = 0; i < LINES / 32; i++) alpha[i] = scores[i * 32 + lane], beta[i] = scores[LINES + i * 32 + lane];
  softmax(alpha);
  softmax(beta);
  float query_add = 0, c_add = 0;
  for (int m = lane; m < NARROW; m += 32) query_add += query[m] * add[m];
  query_add = warp_sum(query_add);

  // c's gradient is there
  if (me < NARROW) {
    of_c[me] = reads && me < WIDTH ? expect(dc + b * NARROW + me, parity ^ 1) : 0;
    erased[me] = of_c[me] * erase[me];
  }
  sync();
  {
    float of_now = 0, of_old = 0;
    if (slot < SLOTS && reads)
      for (int m = part * 4; m < NARROW; m += GANG * 4) {
        of_now += dot4(*(const float4*)(now + slot * PITCH + m), *(const float4*)(of_c + m));
        if (writes) of_old += dot4(*(const float4*)(old + slot * PITCH + m), *(const float4*)(erased + m));
      }
    of_now = ganged(of_now), of_old = ganged(of_old);
    if (part == 0 && slot < LINES) scores[slot] = of_now, scores[LINES + slot] = of_old;
  }
  for (int m = lane; m < NARROW; m += 32) c_add += of_c[m] * add[m];
  c_add = warp_sum(c_add);
  sync();
  float *by_c = scores + 4 * LINES, *by_query = by_c + LINES, *by_key = by_query + LINES, *by_write = by_key + LINES;
  float of_rho = 0, of_share = 0;
  {
    float x[LINES / 32], y[LINES / 32];
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      bool there = i * 32 + lane < SLOTS && reads;
      x[i] = there ? alpha[i] * scores[i * 32 + lane] : 0;
      if (!there) alpha[i] = 0;
      of_rho += x[i];
    }
    of_rho = warp_sum(of_rho);
    const float share = written.rho * sigmoid(written.gamma);
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      const int line = i * 32 + lane;
      x[i] = (x[i] - alpha[i] * of_rho) * rho;
      alpha[i] *= rho;
      y[i] = 0;
      if (line < SLOTS && !silent)
        y[i] = scores[2 * LINES + line] + alpha[i] * (c_add - scores[LINES + line]) + x[i] * (query_add - scores[3 * LINES + line]);
      y[i] = silent ? 0 : y[i] * beta[i];
      of_share += y[i];
    }
    of_share = warp_sum(of_share);
#pragma unroll
    for (int i = 0; i < LINES / 32; i++) {
      const int line = i * 32 + lane;
      if (line / TURN == warp) {
        by_c[line] = alpha[i], by_query[line] = x[i];
        by_key[line] = silent ? 0 : (y[i] - beta[i] * of_share) * share;
        by_write[line] = beta[i] * share;
      }
    }
  }
  sync_warp();
  {
    const int m = lane % QUADS * 4, side = lane / QUADS;
    float4 sum[4] = {};
    if (side < SIDE) {
      const float4 c = *(const float4*)(of_c + m), q = *(const float4*)(query + m), k = *(const float4*)(key + m), e = *(const float4*)(erase + m);
      for (int i = side; i < TURN && warp * TURN + i < SLOTS; i += SIDE) {
        const int line = warp * TURN + i, at = line * PITCH + m;
        float4 g = *(const float4*)(G + at), M = reads ? *(const float4*)(now + at) : make_float4(0, 0, 0, 0);
        float x = by_c[line], s = by_query[line];
        g.x += x * c.x + s * q.x, g.y += x * c.y + s * q.y, g.z += x * c.z + s * q.z, g.w += x * c.w + s * q.w;
        sum[0].x += s * M.x, sum[0].y += s * M.y, sum[0].z += s * M.z, sum[0].w += s * M.w;
        if (cuts) {
          float* to = dfresh + (i64)which * BANK + line * WIDTH + m;
          float all[4] = {g.x, g.y, g.z, g.w};
          for (int n = 0; n < 4; n++)
            if (m + n < WIDTH) to[n] += all[n];
          g = make_float4(0, 0, 0, 0);
        } else if (!silent) {
          M = *(const float4*)(old + at), s = by_key[line], x = by_write[line];
          sum[1].x += s * M.x, sum[1].y += s * M.y, sum[1].z += s * M.z, sum[1].w += s * M.w;
          sum[2].x += x * g.x, sum[2].y += x * g.y, sum[2].z += x * g.z, sum[2].w += x * g.w;
          sum[3].x -= x * g.x * M.x, sum[3].y -= x * g.y * M.y, sum[3].z -= x * g.z * M.z, sum[3].w -= x * g.w * M.w;
          g.x += s * k.x - x * e.x * g.x, g.y += s * k.y - x * e.y * g.y, g.z += s * k.z - x * e.z * g.z, g.w += s * k.w - x * e.w * g.w;
        }
        *(float4*)(G + at) = g;
      }
#pragma unroll
      for (int n = 0; n < 4; n++) *(float4*)(read + ((warp * SIDE + side) * 4 + n) * NARROW + m) = sum[n];
    }
  }
  sync();
  float* piece = pieces + which * PIECE;
  for (int i = me; i < KINDS * NARROW; i += THREADS) {
    const int kind = i / NARROW, m = i % NARROW;
    const bool inside = writes && m < WIDTH;
    float y = 0, z = 0;
    for (int n = 0; n < WARPS * SIDE; n++) y += read[(n * 4 + kind) * NARROW + m];
    if (kind == 2 && !SEPARATE)
      for (int n = 0; n < WARPS * SIDE; n++) z += read[(n * 4 + 3) * NARROW + m];
    if (kind < 2)
      y *= scale;
    else if (inside) {
      const float* at = kept.later + last * AFTER + m;
      y = kind == 2 ? y * 4 * slope(2 * at[WIDTH]) + z * slope(at[ERASE]) : y * slope(at[ERASE]);
    } else
      y = 0;
    publish(piece + i, y, parity);
  }
  if (me < 4) {
    float y = me == 0 ? (writes ? written.rho * of_share * slope(written.gamma) : 0) : me == 1 ? of_rho + share_before * gamma : 0;
    publish(piece + LAST + me, y, parity);
  }
  share_before = of_share;
  if (u > 0 && u % SEGMENT != 0) {  // the memory before the next token, over that after this one
    const float* from = past + ((i64)((u - 1) % SEGMENT) * ALL * BANKS + which) * QUAD_BANK;
    for (int i = me; i < SLOTS * QUADS; i += THREADS) copy16(now + i / QUADS * PITCH + i % QUADS * 4, from + i * 4);
  }
}

// This bank's share of its sequence's vector: of its pieces' sum, of hidden
DEVICE void gather(
    float* whole, const float* pieces, const float* router, int which, const Kept& kept, float* dx, float* dafter, float* dlogits, int t,
    int T, unsigned parity) {
  const int me = thread(), b = which / BANKS, bank = which % BANKS, last_ones = THREADS - 1 - me;
  const i64 row = t * (i64)ALL + b, last = row - ALL;
  const bool reads = t < T, writes = t > 0;
  const bool away = HAS_RESET && reads && kept.reset[row];  // from h before this token
  pieces += b * BANKS * PIECE;
  whole += b * VECTOR;
  for (int k = (me * BANKS + bank) * 4; k <= LAST; k += THREADS * BANKS * 4) {
    const float4 sum = expect4<BANKS, PIECE>(pieces + k, parity);
    float all[4] = {sum.x, sum.y, sum.z, sum.w};
    const int kind = k / NARROW, m = k % NARROW;
    for (int e = 0; e < 4; e++) {
      if (k == LAST && e > 0) all[e] = 0;
      publish(whole + k + e, kind == 0 && away ? 0 : all[e], parity);
      if (k == LAST ? e == 0 && writes : m + e < WIDTH && kind > 0 && writes)
        dafter[last * AFTER + (k == LAST ? AFTER - 1 : (kind - 1) * WIDTH + m + e)] = all[e];
      if (kind == 0 && m + e < WIDTH && reads) dx[row * GIVEN + HIDDEN + m + e] = all[e];
    }
  }
  for (int unit = last_ones * BANKS + bank; unit < round4(HIDDEN); unit += THREADS * BANKS) {
    float y = 0, mean = 0, logit[BANKS];
    if (reads) {
      const float h = unit < HIDDEN ? kept.before[row * KNOWN + unit] : 0;
      float p[BANKS];
#pragma unroll
      for (int i = 0; i < BANKS; i++) p[i] = kept.rho[row * BANKS + i];
#pragma unroll
      for (int i = 0; i < BANKS; i++) {
        logit[i] = expect(pieces + i * PIECE + LAST + 1, parity);
        mean += p[i] * logit[i];
      }
#pragma unroll
      for (int i = 0; i < BANKS; i++) {
        logit[i] = p[i] * (logit[i] - mean);
        if (h > 0) y += logit[i] * router[i * HIDDEN + unit];
        if (unit == 0) dlogits[row * BANKS + i] = logit[i];
      }
      if (unit < HIDDEN) dx[row * GIVEN + unit] = y;
    }
    publish(whole + PIECE + unit, away ? 0 : y, parity);
  }
}

// Weights transposed, as in backward.py; past: [SEGMENT, B, n, QUAD_BANK]; exchange: zeros, of each team
// [BATCH, n, PIECE | BATCH, VECTOR | BATCH, WIDE | 2, BATCH, WIDE | BATCH, WIDE | BATCH, NARROW], EXCHANGED in all
extern "C" __global__ void __launch_bounds__(THREADS, 1) backward(
    const float* h, float* dM, const float* dout, const u8* reset, const u8* valid, const float* w_h, const float* w_c,
    const float* w_candidate, const float* w_after, const float* router, const float* first, const float* before, const float* rho,
    const float* gates, const float* candidate, const float* later, const float* memories, float* dx, float* dafter, float* dlogits,
    float* dh, float* dfresh, float* past, float* exchange, int T) {
  SHARED(shared);
  const int me = thread(), warp = me / 32, lane = me % 32;
  const int column = member() * COLUMNS, component = member() * OF_C;
  {  // of arrays [T, B, …] and [B, …] what follows this team's first sequence
    const i64 ours = team() * BATCH;
    h += ours * D, dM += ours * BANKS * BANK, dout += ours * D, reset += ours, valid += ours, before += ours * KNOWN, rho += ours * BANKS;
    gates += ours * 2 * D, candidate += ours * D, later += ours * AFTER, memories += ours * BANKS * BANK, dx += ours * GIVEN;
    dafter += ours * AFTER, dlogits += ours * BANKS, dh += ours * D, dfresh += ours * BANKS * BANK, past += ours * BANKS * QUAD_BANK;
  }
  float *pieces = exchange + team() * EXCHANGED, *whole = pieces + BATCH * BANKS * PIECE;
  float *to_candidate = whole + BATCH * VECTOR, *to_zeta = to_candidate + BATCH * WIDE, *to_r = to_zeta + 2 * BATCH * WIDE;
  float* to_c = to_r + BATCH * WIDE;
  Kept kept;
  kept.before = before, kept.rho = rho, kept.later = later, kept.memories = memories, kept.first = first;
  kept.reset = reset, kept.valid = valid;

  // Rows: h's columns by what the memory read and wrote; those and c's components by the gradients of the candidate, ζ and r
  Rows<RV, CHUNKS_V> by_vector;
  Rows<RT, CHUNKS> by_candidate, by_zeta, by_r;
  const int H = KNOWN + 2 * D;
  by_vector.load([&](int i, int k) {
    const int j = column + i, kind = k / NARROW, m = k % NARROW;
    if (i >= COLUMNS || j >= D) return 0.0f;
    if (k >= PIECE) return k - PIECE < HIDDEN ? w_h[(i64)j * H + k - PIECE] : 0;
    if (k >= LAST) return k == LAST ? w_after[(i64)j * AFTER + AFTER - 1] : 0;
    if (m >= WIDTH) return 0.0f;
    return kind == 0 ? w_h[(i64)j * H + HIDDEN + m] : w_after[(i64)j * AFTER + (kind - 1) * WIDTH + m];
  }, warp, WARPS);
  auto row = [&](const float* of_h, int width, int gate) {
    return [=](int i, int k) {
      const int j = column + i, m = component + i - COLUMNS;
      if (k >= D || i >= ROWS) return 0.0f;
      if (i < COLUMNS) return j < D ? of_h[(i64)j * width + k] : 0;
      return m < WIDTH ? w_c[(i64)m * 3 * D + gate * D + k] : 0;
    };
  };
  by_candidate.load(row(w_candidate, D, 2), warp, WARPS);
  by_zeta.load(row(w_h + KNOWN + D, H, 1), warp, WARPS);
  by_r.load(row(w_h + KNOWN, H, 0), warp, WARPS);

  for (int i = me; i < BANKS * HIDDEN; i += THREADS) shared[AT_ROUTER + i] = router[i];
  float share[HOLDS];
#pragma unroll
  for (int held = 0; held < HOLDS; held++) {
    const int which = held * PROGRAMS + (PROGRAMS - 1 - member());
    share[held] = 0;
    if (which < BATCH * BANKS) load_bank(shared + AT_MEMORY + held * 3 * STATES, dM + (i64)which * BANK);
  }
  const int OWN = cut(ROWS * BATCH, THREADS);
  float base[OWN], through[OWN];
#pragma unroll
  for (int n = 0; n < OWN; n++) base[n] = through[n] = 0;
  sync();

  for (int done = 0; done <= T; done++) {
    const int t = T - done;
    const unsigned parity = (done + 1) & 1;
    const i64 now = t * (i64)ALL, last = now - ALL;
    float* zeta_here = to_zeta + done % 2 * BATCH * WIDE;  // read after what tells others to go on
    const unsigned zeta_parity = (done / 2 + 1) & 1;

    float r[OWN], z[OWN], x[OWN], old[OWN], dy[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const int o = me + n * THREADS, i = o % ROWS, b = o / ROWS, j = column + i;
      const bool there = t > 0 && b < BATCH && i < COLUMNS && j < D;
      r[n] = there ? gates[(last + b) * 2 * D + j] : 0, z[n] = there ? gates[(last + b) * 2 * D + D + j] : 0;
      x[n] = there ? candidate[(last + b) * D + j] : 0, dy[n] = there ? dout[(last + b) * D + j] : 0;
      old[n] = there && !(HAS_RESET && reset[last + b]) ? h[(last + b) * D + j] : 0;
    }
#pragma unroll
    for (int held = 0; held < HOLDS; held++) {
      const int which = held * PROGRAMS + (PROGRAMS - 1 - member());
      float *G = shared + AT_MEMORY + held * 3 * STATES, *one = G + STATES, *other = one + STATES;
      if (which < BATCH * BANKS)
        recall(G, done % 2 ? one : other, done % 2 ? other : one, shared, which, kept, past, to_c, pieces, dfresh, share[held], t, T, parity);
    }

#pragma unroll
    for (int held = 0; held < HOLDS; held++) {
      const int which = held * PROGRAMS + (PROGRAMS - 1 - member());
      if (which < BATCH * BANKS) gather(whole, pieces, shared + AT_ROUTER, which, kept, dx, dafter, dlogits, t, T, parity);
    }
    if (column >= WIDE && component >= WIDTH) {
      sync();
      continue;
    }
    product(by_vector, whole, VECTOR, warp, WARPS, VECTOR, parity, shared + AT_V + warp * SEQUENCES * apart(RV));
    sync();
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const int o = me + n * THREADS, i = o % ROWS, b = o / ROWS, j = column + i;
      if (b >= BATCH || i >= COLUMNS || j >= WIDE) continue;
      float g = HAS_VALID && t < T && !valid[now + b] ? through[n] : base[n];
      if (HAS_RESET && t < T && reset[now + b]) g = 0;
      g += total<RV>(shared + AT_V, b, i, WARPS) + dy[n];
      through[n] = g;
      if (t == 0) {
        if (j < D) dh[b * D + j] = g;
        continue;
      }
      if (HAS_VALID && !valid[last + b]) g = 0;
      const float dcandidate = g * (4 * slope(2 * x[n])) * sigmoid(-z[n]), dz = g * (old[n] - tanh_(x[n])) * slope(z[n]);
      publish(to_candidate + b * WIDE + j, dcandidate, parity);
      publish(zeta_here + b * WIDE + j, dz, zeta_parity);
      if (j < D) {
        float* to = dx + (last + b) * GIVEN + KNOWN + j;
        to[D] = dz, to[2 * D] = dcandidate;
      }
      base[n] = g * sigmoid(z[n]);
    }
    if (t == 0) break;

    product(by_candidate, to_candidate, WIDE, warp, WARPS, WIDE, parity, shared + AT_C + warp * SEQUENCES * apart(RT));
    sync();
    float partial[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const int o = me + n * THREADS, i = o % ROWS, b = o / ROWS, j = column + i;
      partial[n] = 0;
      if (b >= BATCH) continue;
      const float y = total<RT>(shared + AT_C, b, i, WARPS);
      if (i >= COLUMNS)
        partial[n] = y;
      else if (j < WIDE) {
        const float dr = y * old[n] * slope(r[n]);
        publish(to_r + b * WIDE + j, dr, parity);
        if (j < D) dx[(last + b) * GIVEN + KNOWN + j] = dr;
        base[n] += y * sigmoid(r[n]);
      }
    }
    product(by_zeta, zeta_here, WIDE, warp, WARPS, WIDE, zeta_parity, shared + AT_Z + warp * SEQUENCES * apart(RT));
    product(by_r, to_r, WIDE, warp, WARPS, WIDE, parity, shared + AT_R + warp * SEQUENCES * apart(RT));
    sync();
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const int o = me + n * THREADS, i = o % ROWS, b = o / ROWS, m = component + i - COLUMNS;
      if (b >= BATCH) continue;
      const float y = partial[n] + (total<RT>(shared + AT_Z, b, i, WARPS) + total<RT>(shared + AT_R, b, i, WARPS));
      if (i < COLUMNS)
        base[n] += y;
      else if (m < WIDTH)
        publish(to_c + b * NARROW + m, y, parity);
    }
  }
  sync();
#pragma unroll
  for (int held = 0; held < HOLDS; held++) {
    const int which = held * PROGRAMS + (PROGRAMS - 1 - member());
    if (which < BATCH * BANKS)
      for (int i = me; i < BANK; i += THREADS) dM[(i64)which * BANK + i] = shared[AT_MEMORY + held * 3 * STATES + i / WIDTH * PITCH + i % WIDTH];
  }
}
