// What MoM-GRU's kernels share (forward.cu, backward.cu): how programs exchange values, products with weights that stay in registers,
// σ and tanh.
//
// TEAMS teams of PROGRAMS programs of WARPS warps are on the GPU at once. A team goes through the tokens of its BATCH sequences, each program
// with COLUMNS columns of h, rows of the other products, and banks of memory. What all of a team need goes through arrays in L2, one token's
// values over the last one's, of which each program loads all: a team of half the programs has half the sequences to load. A value's last
// bit says whether the token's number is even: who needs it loads until it is the right one, so that an exchange is one store and one
// load, without a barrier or a flag. It may be overwritten as soon as everyone has it, which is sure where what one waited for in between
// depends on it. So a program waits for nothing that it makes nothing of: nobody would wait for such a one, and one that is late (a GPU that
// several processes share stops its programs one by one) would find the next token's value, and wait for ever.

const int THREADS = 32 * WARPS;
const int ALL = BATCH * TEAMS;  // sequences
const int TILES = (BATCH + 15) / 16;  // of 16 sequences

DEVICE int team() { return program() / PROGRAMS; }
DEVICE int member() { return program() % PROGRAMS; }

DEVICE constexpr int cut(int n, int by) { return (n + by - 1) / by; }
DEVICE constexpr int round4(int n) { return (n + 3) / 4 * 4; }

const int COLUMNS = cut(round4(D), PROGRAMS);  // of a program; of h, and a few zeros, so that all are read in fours
const int WIDE = round4(D);
const int NARROW = round4(WIDTH);
const int KNOWN = HIDDEN + WIDTH, GIVEN = KNOWN + 3 * D;  // products with x: those that the memory wants, the gates'
const int ERASE = AFTER - 1 - WIDTH;
const int CHUNKS = cut(cut(WIDE, 16), WARPS);  // of 16 columns, of which a warp takes its share
const int BANK = SLOTS * WIDTH;
const int HOLDS = cut(BATCH * BANKS, PROGRAMS);  // banks of a program

// A thread's share of a bank: GANG threads a slot
DEVICE constexpr int power(int n) { return n <= 32 ? 32 : 2 * power((n + 1) / 2); }
const int LINES = power(SLOTS);
const int GANG = THREADS / LINES < 32 ? THREADS / LINES : 32;
DEVICE constexpr int pitched(int n) { return GANG * 4 % 32 == 0 || n % 32 == GANG * 4 % 32 ? n : pitched(n + 4); }
const int PITCH = pitched(NARROW);
const int QUADS = NARROW / 4, SIDE = 32 / QUADS;  // a warp reads SIDE slots at once
const int TURN = cut(SLOTS, WARPS);  // slots that a warp reads

DEVICE void publish(float* p, float v, unsigned parity) {
  unsigned x = bits(v);
  if (v != v) x = 0x7fffffff;  // a NaN of one bit would become an infinity
  poke(p, number((x & ~1u) | parity));
}

// KIND 1: float32, 2: bfloat16, 3: float16
template <int KIND> DEVICE float load_as(const void* p, i64 i) {
  if (KIND == 1) return ((const float*)p)[i];
  const u16 x = ((const u16*)p)[i];
  return KIND == 2 ? number(unsigned(x) << 16) : from_half(x);
}
template <int KIND> DEVICE u16 narrowed(float x) {
  if (KIND == 3) return to_half(x);
  return x != x ? 0x7fff : (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16;
}
template <int KIND> DEVICE void store_as(void* p, i64 i, float x) {
  if (KIND == 1)
    ((float*)p)[i] = x;
  else
    ((u16*)p)[i] = narrowed<KIND>(x);
}
template <int KIND> DEVICE float rounded(float x) {
  if (KIND == 1) return x;
  const u16 y = narrowed<KIND>(x);
  return KIND == 2 ? number(unsigned(y) << 16) : from_half(y);
}

DEVICE bool fresh4(float4 v, unsigned parity) {
  unsigned flip = parity - 1;  // all ones for 0
  return (bits(v.x) ^ flip) & (bits(v.y) ^ flip) & (bits(v.z) ^ flip) & (bits(v.w) ^ flip) & 1;
}

// Without the bit: what was 0 is 0 again, as gradients of nothing have to be. (A product's operands in tf32 end above it.)
DEVICE float received(float x) { return number(bits(x) & ~1u); }

DEVICE float expect(const float* p, unsigned parity) {
  float v;
  do v = peek(p);
  while ((bits(v) & 1) != parity);
  return received(v);
}

// The sum of PARTS pieces, APART from each other
template <int PARTS, int APART> DEVICE float4 expect4(const float* p, unsigned parity) {
  float4 v[PARTS];
  bool again;
  while (!fresh4(peek4(p), parity)) {
  }
  do {
    again = false;
#pragma unroll
    for (int i = 0; i < PARTS; i++) v[i] = peek4(p + i * APART);
#pragma unroll
    for (int i = 0; i < PARTS; i++) again |= !fresh4(v[i], parity);
  } while (again);
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < PARTS; i++) sum.x += received(v[i].x), sum.y += received(v[i].y), sum.z += received(v[i].z), sum.w += received(v[i].w);
  return sum;
}

DEVICE void load_bank(float* to, const float* from) {  // [SLOTS, WIDTH] → [SLOTS, PITCH], zeros beside it
  for (int i = thread(); i < SLOTS * NARROW; i += THREADS) {
    int m = i % NARROW, slot = i / NARROW;
    to[slot * PITCH + m] = m < WIDTH ? from[slot * WIDTH + m] : 0;
  }
}

DEVICE float sigmoid(float x) {
  float e = exp2_(-fabsf(x) * 1.4426950408889634f);
  return (x < 0 ? e : 1.0f) / (1 + e);
}

// Of σ: σ(x) σ(−x), since y(1−y) has no digits where y is nearly 1
DEVICE float slope(float x) {
  float e = exp2_(-fabsf(x) * 1.4426950408889634f);
  return e / ((1 + e) * (1 + e));
}

// As in parts.py
DEVICE float tanh_(float x) {
  float q = x * x;
  if (fabsf(x) < 0.5f) return x * (135135 + q * (17325 + q * (378 + q))) / (135135 + q * (62370 + q * (3150 + 28 * q)));
  float e = exp2_(-2 * fabsf(x) * 1.4426950408889634f), large = (1 - e) / (1 + e);
  return x < 0 ? -large : large;
}

DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += from_lane(x, mask);
  return x;
}
DEVICE float warp_max(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, from_lane(x, mask));
  return x;
}

// The first 11 bits of x rounded, as an operand; what is left of x has 12 bits.
DEVICE unsigned high(float x) { return (bits(x) + 0x1000) & 0xffffe000; }

// 8 · NT rows of a matrix, of whose columns a warp has CHUNKS times 16. A lane's four columns of a chunk lie side by side.
template <int NT, int CHUNKS> struct Rows {
  float v[NT][CHUNKS][4];

  // value(i, k): row i, column k; first: the warp's first chunk; every: between its chunks
  template <class Value> DEVICE void load(Value value, int first, int every) {
    int lane = thread() % 32;
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int i = 0; i < CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) v[nt][i][e] = value(nt * 8 + lane / 4, (first + i * every) * 16 + lane % 4 * 4 + e);
  }
};

// Between sequences in a product's sums: lanes that store at once meet in no bank
DEVICE constexpr int apart(int NT) { return NT % 2 ? 8 * NT : 8 * NT + 8; }
const int SEQUENCES = 16 * TILES;  // in a product's sums

// sums[sequence][apart(NT)] = x · rowsᵀ, of 16 sequences, over this warp's chunks: three products of 11 bits each.
template <int NT, int CHUNKS> DEVICE void multiply(const Rows<NT, CHUNKS>& w, const float4 (&x)[2][CHUNKS], float* sums) {
  int lane = thread() % 32;
  float large[NT][4] = {}, left[NT][4] = {}, right[NT][4] = {};
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    float in[2][4] = {{x[0][i].x, x[0][i].y, x[0][i].z, x[0][i].w}, {x[1][i].x, x[1][i].y, x[1][i].z, x[1][i].w}};
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      unsigned a[4], rest[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float value = in[e % 2][s + e / 2];
        a[e] = high(value);
        rest[e] = bits(value - number(a[e]));
      }
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        float w0 = w.v[nt][i][s], w1 = w.v[nt][i][s + 1];
        hold(w0), hold(w1);
        unsigned b0 = high(w0), b1 = high(w1);
        mma(large[nt], a, b0, b1);
        mma(left[nt], rest, b0, b1);
        mma(right[nt], a, bits(w0 - number(b0)), bits(w1 - number(b1)));
      }
    }
  }
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      sums[(lane / 4 + e / 2 * 8) * apart(NT) + nt * 8 + lane % 4 * 2 + e % 2] = large[nt][e] + (left[nt][e] + right[nt][e]);
}

// x [BATCH, row] as it arrives, of which the chunks from `first` on, `every` apart, to K; sums [SEQUENCES, apart(NT)]
template <int NT, int CHUNKS>
DEVICE void product(const Rows<NT, CHUNKS>& w, const float* x, int row, int first, int every, int K, unsigned parity, float* sums) {
  int lane = thread() % 32;
  for (int tile = 0; tile < TILES; tile++) {
    float4 v[2][CHUNKS];
    // n * 8: so that the compiler knows of few sequences
    auto there = [&](int n, int i) { return n * 8 < BATCH && tile * 16 + n * 8 + lane / 4 < BATCH && (first + i * every) * 16 + lane % 4 * 4 < K; };
    auto at = [&](int n, int i) { return x + (tile * 16 + n * 8 + lane / 4) * row + (first + i * every) * 16 + lane % 4 * 4; };
    bool again;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) v[n][i] = there(n, i) ? peek4(at(n, i)) : make_float4(0, 0, 0, 0);
    do {
      again = false;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
          if (there(n, i) && !fresh4(v[n][i], parity)) {
            again = true;
            v[n][i] = peek4(at(n, i));
          }
    } while (again);
    sync_warp();
    multiply(w, v, sums + tile * 16 * apart(NT));
  }
}

// Row i of sequence b of a product whose columns `parts` warps share
template <int NT> DEVICE float total(const float* sums, int b, int i, int parts) {
  float y = 0;
  for (int w = 0; w < parts; w++) y += sums[(w * SEQUENCES + b) * apart(NT) + i];
  return y;
}
