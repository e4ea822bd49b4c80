// Element types, 16-byte vectors of them, and how each is loaded, stored and converted.
//
// Nothing is included: CuPy's disk cache does not see the contents of headers, and cuda_fp16.h is not
// everywhere.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// Statistics are float32, float64 for float64.
template <class T>
struct Accumulator {
    typedef float type;
};
template <>
struct Accumulator<double> {
    typedef double type;
};

struct alignas(16) Vec {
    u32 w[4];
};

template <class T>
struct PerVec {
    static constexpr int count = 16 / (int)sizeof(T);  // elements of one vector
};

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// ---- bits --------------------------------------------------------------------------------------

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the width");
    union {
        From from;
        To to;
    } both;
    both.from = from;
    return both.to;
}

// Smallest k with 2^k >= n.
__device__ __forceinline__ int ceil_log2(i64 n) {
    return 64 - __clzll(n - 1);
}

__device__ __forceinline__ void power_of_two(float& out, int exponent) {
    out = bit_cast<float>((u32)(127 + exponent) << 23);
}
__device__ __forceinline__ void power_of_two(double& out, int exponent) {
    out = bit_cast<double>((u64)(1023 + exponent) << 52);
}

// 1 / p of a power of two.
__device__ __forceinline__ float inverse_of(float p) { return bit_cast<float>(0x7f000000u - bit_cast<u32>(p)); }
__device__ __forceinline__ double inverse_of(double p) {
    return bit_cast<double>(0x7fe0000000000000ull - bit_cast<u64>(p));
}

// Every a*b+c of the statistics is written out as one fma. Left to the compiler, two kernels could
// contract the same expression differently and a row's bits would depend on the kernel.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// And every product that is added to something, where it is not to be fused, is rounded first.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float square_root(float a) { return sqrtf(a); }
__device__ __forceinline__ double square_root(double a) { return sqrt(a); }

// ---- 16-byte accesses of global memory -----------------------------------------------------------
// x is read once and y written once, so neither should push weight and bias out of L1. The loads are
// not .nc: y may be x.

__device__ __forceinline__ Vec load16(const unsigned char* p) {
    Vec v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void store16(unsigned char* p, const Vec& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}

// As plain stores the compiler would cut a vector up where it likes.
__device__ __forceinline__ void store16_to_keep(void* p, const Vec& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}

// ---- conversions ---------------------------------------------------------------------------------

__device__ __forceinline__ float f16_to_float(u32 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
}

__device__ __forceinline__ u32 f16_pair(float lo, float hi) {
    u32 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
#else
    u16 a, b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(lo));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(hi));
    pair = (u32)a | (u32)b << 16;
#endif
    return pair;
}

// bfloat16 is the upper half of a float32; rounding to nearest even carries into it, NaN stays NaN.
__device__ __forceinline__ u32 bf16_bits(float f) {
    const u32 bits = bit_cast<u32>(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

__device__ __forceinline__ u32 bf16_pair(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
#else
    return bf16_bits(lo) | bf16_bits(hi) << 16;
#endif
}

__device__ __forceinline__ float to_float(f16 v) { return f16_to_float(v.bits); }
__device__ __forceinline__ float to_float(bf16 v) { return bit_cast<float>((u32)v.bits << 16); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ double to_float(double v) { return v; }

// One accumulator rounded to an element. `T*` only names the type.
template <class A>
__device__ __forceinline__ f16 rounded(A v, const f16*) {
    return f16{(u16)f16_pair((float)v, 0.0f)};
}
template <class A>
__device__ __forceinline__ bf16 rounded(A v, const bf16*) {
    return bf16{(u16)bf16_pair((float)v, 0.0f)};
}
template <class A>
__device__ __forceinline__ float rounded(A v, const float*) {
    return (float)v;
}
template <class A>
__device__ __forceinline__ double rounded(A v, const double*) {
    return (double)v;
}

// A copy that the compiler must take for new. Each pass over a row unpacks its vectors again; for
// sm_100 and later the compiler would rather keep the first pass's floats, and spill them.
__device__ __forceinline__ Vec unseen(Vec v) {
    asm volatile("" : "+r"(v.w[0]), "+r"(v.w[1]), "+r"(v.w[2]), "+r"(v.w[3]));
    return v;
}

// As for vectors.
__device__ __forceinline__ u32 unseen(u32 w) {
    asm volatile("" : "+r"(w));
    return w;
}

// Element i of those that lie packed in words. `T*` only names the type.
__device__ __forceinline__ float element(const u32* w, int i, const float*) { return bit_cast<float>(unseen(w[i])); }
__device__ __forceinline__ double element(const u32* w, int i, const double*) {
    return bit_cast<double>((u64)unseen(w[2 * i]) | (u64)unseen(w[2 * i + 1]) << 32);
}
template <class T>
__device__ __forceinline__ float element(const u32* w, int i, const T*) {
    T v;
    v.bits = (u16)(unseen(w[i / 2]) >> 16 * (i % 2));
    return to_float(v);
}

// The elements of a vector, in column order. `T*` only names the type.
__device__ __forceinline__ void unpack(const Vec& v, float (&out)[8], const f16*) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = f16_to_float(v.w[i / 2] >> 16 * (i % 2) & 0xffffu);
}
__device__ __forceinline__ void unpack(const Vec& v, float (&out)[8], const bf16*) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        out[i] = bit_cast<float>(i % 2 ? v.w[i / 2] & 0xffff0000u : v.w[i / 2] << 16);
}
__device__ __forceinline__ void unpack(const Vec& v, float (&out)[4], const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bit_cast<float>(v.w[i]);
}
__device__ __forceinline__ void unpack(const Vec& v, double (&out)[2], const double*) {
#pragma unroll
    for (int i = 0; i < 2; ++i) out[i] = bit_cast<double>((u64)v.w[2 * i] | (u64)v.w[2 * i + 1] << 32);
}

__device__ __forceinline__ void pack(Vec& v, const float (&in)[8], const f16*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = f16_pair(in[2 * i], in[2 * i + 1]);
}
__device__ __forceinline__ void pack(Vec& v, const float (&in)[8], const bf16*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = bf16_pair(in[2 * i], in[2 * i + 1]);
}
__device__ __forceinline__ void pack(Vec& v, const float (&in)[4], const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = bit_cast<u32>(in[i]);
}
__device__ __forceinline__ void pack(Vec& v, const double (&in)[2], const double*) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u64 bits = bit_cast<u64>(in[i]);
        v.w[2 * i] = (u32)bits;
        v.w[2 * i + 1] = (u32)(bits >> 32);
    }
}
