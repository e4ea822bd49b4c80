// Sums over the lanes of a warp and the warps of a block, always in one fixed order.

// Every lane gets the same bits: in each step both partners add the same two numbers.
template <int LANES, class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step, LANES);
    return value;
}

template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[2]) {
    return t[0] + t[1];
}
template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[4]) {
    return (t[0] + t[1]) + (t[2] + t[3]);
}
template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[8]) {
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

// Adds what `count` warps have left in shared memory, in warp order.
template <int COUNT, class A>
__device__ __forceinline__ A ordered_sum(const A* partial) {
    A total = partial[0];
#pragma unroll
    for (int w = 1; w < COUNT; ++w) total += partial[w];
    return total;
}
