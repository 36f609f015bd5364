// What the scan's CUDA source asks of the hardware. No header is included: NVRTC has none where no toolkit is installed.

typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements in memory: 0 float32, 1 bfloat16, 2 float16.
template <int T> struct Element { typedef u16 type; };
template <> struct Element<0> { typedef float type; };

template <int T> __device__ __forceinline__ float widen(typename Element<T>::type x);
template <> __device__ __forceinline__ float widen<0>(float x) { return x; }
template <> __device__ __forceinline__ float widen<1>(u16 x) { return __uint_as_float(unsigned(x) << 16); }
template <> __device__ __forceinline__ float widen<2>(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

template <int T> __device__ __forceinline__ typename Element<T>::type narrow(float x);
template <> __device__ __forceinline__ float narrow<0>(float x) { return x; }
template <> __device__ __forceinline__ u16 narrow<1>(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ u16 narrow<2>(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// BYTES from global to shared memory, of which the first `there` exist; the others become 0. In the background where a copy has 4 or more.
template <int BYTES> __device__ __forceinline__ void copy(void* to, const void* from, int there) {
  unsigned at = unsigned(__cvta_generic_to_shared(to));
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there) : "memory");
  else if (BYTES == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(there) : "memory");
  else if (BYTES == 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(there) : "memory");
  else
    *(u16*)to = there ? *(const u16*)from : u16(0);
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
