// The CUDA names that kernel text uses, mapped to the runtime; force-included before the text.
// No standard header is included: the text must compile on its own, as under NVRTC.
#pragma once

typedef unsigned int simt_u32;
typedef unsigned long long simt_u64;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

extern "C" {
// Constant within one thread, hence within one fiber.
uint3 simt_thread_idx() __attribute__((const));
uint3 simt_block_idx() __attribute__((const));
dim3 simt_block_dim() __attribute__((const));
dim3 simt_grid_dim() __attribute__((const));
void simt_syncthreads(int line);
int simt_syncthreads_vote(int line, int op, int predicate);
simt_u64 simt_collective(int op, simt_u32 size, simt_u32 mask, simt_u64 value, int param, int width);
void* simt_dynamic_shared();
// Vectors of 32 bytes: whether the device has them, and their accesses.
int simt_wide_vectors();
void simt_load32(const void* p, void* out);
void simt_store32(void* p, const void* in);
// Asynchronous copies and mbarriers: what kernels/stage.cuh has PTX for.
void simt_copy_async(void* to, const void* from, simt_u32 bytes);
void simt_wait_copies();
void simt_arrival_init(void* arrival, simt_u32 count);
void simt_fence_bulk();
void simt_arrive_with_copies(void* arrival);
void simt_arrive_expecting(void* arrival, simt_u32 bytes);
void simt_copy_bulk(void* to, const void* from, simt_u32 bytes, void* arrival);
void simt_arrival_wait(void* arrival, simt_u32 parity);
// What stands for PTX's %cluster_ctarank, barrier.cluster.arrive and .wait, and mapa.
int simt_cluster_rank() __attribute__((const));
void simt_cluster_arrive(int release);
void simt_cluster_wait();
void* simt_cluster_map(void* p, int rank);

float sqrtf(float);
double sqrt(double);
float fmaf(float, float, float);
double fma(double, double, double);
float fabsf(float);
double fabs(double);
float fmaxf(float, float);
float fminf(float, float);
double fmax(double, double);
double fmin(double, double);
float floorf(float);
double floor(double);
float ceilf(float);
double ceil(double);
float ldexpf(float, int);
double ldexp(double, int);
float rintf(float);
double rint(double);
}

#define threadIdx (simt_thread_idx())
#define blockIdx (simt_block_idx())
#define blockDim (simt_block_dim())
#define gridDim (simt_grid_dim())
#define warpSize 32

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((section("simt_shared")))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

#define SIMT_INLINE inline __attribute__((always_inline))

enum { SIMT_SYNC, SIMT_IDX, SIMT_UP, SIMT_DOWN, SIMT_XOR, SIMT_ANY, SIMT_ALL, SIMT_BALLOT };

SIMT_INLINE void __syncthreads(int line = __builtin_LINE()) { simt_syncthreads(line); }
SIMT_INLINE int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return simt_syncthreads_vote(line, 0, predicate != 0);
}
SIMT_INLINE int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return simt_syncthreads_vote(line, 1, predicate != 0);
}
SIMT_INLINE int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return simt_syncthreads_vote(line, 2, predicate != 0);
}
SIMT_INLINE void __syncwarp(simt_u32 mask = 0xffffffffu) {
  simt_collective(SIMT_SYNC, 0, mask, 0, 0, 32);
}
SIMT_INLINE int __any_sync(simt_u32 mask, int predicate) {
  return (int)simt_collective(SIMT_ANY, 0, mask, predicate != 0, 0, 32);
}
SIMT_INLINE int __all_sync(simt_u32 mask, int predicate) {
  return (int)simt_collective(SIMT_ALL, 0, mask, predicate != 0, 0, 32);
}
SIMT_INLINE unsigned __ballot_sync(simt_u32 mask, int predicate) {
  return (unsigned)simt_collective(SIMT_BALLOT, 0, mask, predicate != 0, 0, 32);
}
SIMT_INLINE void __threadfence() {}
SIMT_INLINE void __threadfence_block() {}

namespace simt {
template <class T>
SIMT_INLINE T shuffle(int op, simt_u32 mask, T value, int param, int width) {
  simt_u64 bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = simt_collective(op, sizeof(T), mask, bits, param, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace simt

// Overloads, not templates, so that what CUDA converts or rejects is converted or rejected here.
#define SIMT_SHUFFLES(T)                                                                   \
  SIMT_INLINE T __shfl_sync(simt_u32 mask, T value, int lane, int width = 32) {            \
    return simt::shuffle(SIMT_IDX, mask, value, lane, width);                              \
  }                                                                                        \
  SIMT_INLINE T __shfl_up_sync(simt_u32 mask, T value, unsigned delta, int width = 32) {   \
    return simt::shuffle(SIMT_UP, mask, value, (int)delta, width);                         \
  }                                                                                        \
  SIMT_INLINE T __shfl_down_sync(simt_u32 mask, T value, unsigned delta, int width = 32) { \
    return simt::shuffle(SIMT_DOWN, mask, value, (int)delta, width);                       \
  }                                                                                        \
  SIMT_INLINE T __shfl_xor_sync(simt_u32 mask, T value, int lanes, int width = 32) {       \
    return simt::shuffle(SIMT_XOR, mask, value, lanes, width);                             \
  }
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(unsigned)
SIMT_SHUFFLES(long)
SIMT_SHUFFLES(unsigned long)
SIMT_SHUFFLES(long long)
SIMT_SHUFFLES(unsigned long long)
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(double)
#undef SIMT_SHUFFLES

#define SIMT_MINMAX(T)                                         \
  SIMT_INLINE T min(T a, T b) { return b < a ? b : a; }        \
  SIMT_INLINE T max(T a, T b) { return a < b ? b : a; }
SIMT_MINMAX(int)
SIMT_MINMAX(unsigned)
SIMT_MINMAX(long)
SIMT_MINMAX(unsigned long)
SIMT_MINMAX(long long)
SIMT_MINMAX(unsigned long long)
#undef SIMT_MINMAX

SIMT_INLINE float rsqrtf(float a) { return 1.0f / sqrtf(a); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
SIMT_INLINE float __frcp_rn(float a) { return 1.0f / a; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
SIMT_INLINE double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
SIMT_INLINE double __dsqrt_rn(double a) { return sqrt(a); }
SIMT_INLINE double __ddiv_rn(double a, double b) { return a / b; }
SIMT_INLINE int __popc(unsigned a) { return __builtin_popcount(a); }
SIMT_INLINE int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
SIMT_INLINE int __ffs(int a) { return __builtin_ffs(a); }

namespace simt {
template <class To, class From>
SIMT_INLINE To bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace simt
SIMT_INLINE int __float_as_int(float a) { return simt::bits<int>(a); }
SIMT_INLINE unsigned __float_as_uint(float a) { return simt::bits<unsigned>(a); }
SIMT_INLINE float __int_as_float(int a) { return simt::bits<float>(a); }
SIMT_INLINE float __uint_as_float(unsigned a) { return simt::bits<float>(a); }
SIMT_INLINE long long __double_as_longlong(double a) { return simt::bits<long long>(a); }
SIMT_INLINE double __longlong_as_double(long long a) { return simt::bits<double>(a); }
template <class T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}

// The call into an entry, made from its type: args[i] points at the i-th argument's bytes.
namespace simt {
template <int... I>
struct indices {};

template <class T> struct letter { static constexpr char value = 's'; };
template <class T> struct letter<T*> { static constexpr char value = 'p'; };
template <> struct letter<float> { static constexpr char value = 'f'; };
template <> struct letter<double> { static constexpr char value = 'f'; };
#define SIMT_INTEGRAL(T) \
  template <> struct letter<T> { static constexpr char value = 'i'; };
SIMT_INTEGRAL(bool) SIMT_INTEGRAL(char) SIMT_INTEGRAL(signed char) SIMT_INTEGRAL(unsigned char)
SIMT_INTEGRAL(short) SIMT_INTEGRAL(unsigned short) SIMT_INTEGRAL(int) SIMT_INTEGRAL(unsigned)
SIMT_INTEGRAL(long) SIMT_INTEGRAL(unsigned long) SIMT_INTEGRAL(long long)
SIMT_INTEGRAL(unsigned long long)
#undef SIMT_INTEGRAL

template <class... P, int... I>
__attribute__((no_sanitize_thread, noinline)) void call(void (*entry)(P...), void** args,
                                                        indices<I...>) {
  entry(*static_cast<P*>(args[I])...);
}
template <class... P>
__attribute__((no_sanitize_thread, noinline)) void call(void (*entry)(P...), void** args) {
  call(entry, args, indices<__integer_pack(sizeof...(P))...>());
}
// (letter, size) per parameter; returns their number.
template <class... P>
int signature(void (*)(P...), int* out) {
  int n = 0;
  ((out[n++] = letter<P>::value, out[n++] = (int)sizeof(P)), ...);
  return n / 2;
}
}  // namespace simt

// One entry per library; build.py appends SIMT_ENTRY(name) after the text.
extern "C" char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));
// The linker puts this section right after simt_shared: an overrun lands in it, not on a constant.
asm(".pushsection simt_shared_gap,\"aw\",@progbits\n.zero 1024\n.popsection");
#define SIMT_ENTRY(name)                                                                        \
  extern "C" __attribute__((no_sanitize_thread)) void simt_call(void** a) { simt::call(name, a); } \
  extern "C" int simt_signature(int* out) { return simt::signature(name, out); }                \
  extern "C" char* simt_static_shared(int stop) {                                               \
    return stop ? __stop_simt_shared : __start_simt_shared;                                     \
  }
