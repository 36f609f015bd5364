// What MoM-GRU's CUDA source asks of the hardware. No header is included: NVRTC has none where no toolkit is installed.

typedef unsigned char u8;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define SHARED(name) \
  extern __shared__ float4 room[]; \
  float* name = (float*)room

DEVICE int thread() { return threadIdx.x; }
DEVICE int program() { return blockIdx.x; }
DEVICE void sync() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float from_lane(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE unsigned bits(float x) { return __float_as_uint(x); }
DEVICE float number(unsigned x) { return __uint_as_float(x); }

DEVICE u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float from_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The compiler may not compute with x before this place, and keep what it finds in registers.
DEVICE void hold(float& x) { asm volatile("" : "+f"(x)); }

// What another program may be storing at this moment: each word is whole, and no other is ordered by it.
DEVICE float4 peek4(const float* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE float peek(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void poke(float* p, float v) { asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }

// c += a · b, 16 × 8 by 8 × 8, of which the tensor cores take the first 11 bits
DEVICE void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory in the background, until a thread waits for all of its copies
DEVICE void copy16(float* to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
DEVICE void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }
