// Chunks: 16 KiB of a row, the unit of the statistics of K3 and K5.
//
// A chunk is always held by 256 threads, 4 vectors each, so its mean and M2 have the same bits in
// whichever kernel computes them; runs of chunks are always merged in the same tree. That is why the
// split-row kernel may be chosen by the number of rows without changing a bit of the result.

enum {
    CHUNK_WARPS = 8,
    CHUNK_THREADS = 32 * CHUNK_WARPS,
    CHUNK_VECS = 4,  // per thread
    // Words of one chunk's partial sums: an odd number, so that lanes which read the sums of
    // neighbouring chunks (K3's merge) meet different banks.
    CHUNK_PARTIALS = 3 * CHUNK_WARPS + 1,
};

template <class T>
struct Chunk {
    static constexpr int warp_cols = 32 * CHUNK_VECS * PerVec<T>::count;
    static constexpr int cols = CHUNK_WARPS * warp_cols;
};

// One chunk's partial sums in shared memory: A partial[3][CHUNK_WARPS].
template <class A>
__device__ __forceinline__ A chunk_mean(const A* partial, int n) {
    return ordered_sum<CHUNK_WARPS>(partial) / (A)n;
}

template <class A>
__device__ __forceinline__ void put_deviations(A* partial, int warp, int lane, A sum, A squares) {
    sum = warp_sum<32>(sum);
    squares = warp_sum<32>(squares);
    if (lane == 0) {
        partial[CHUNK_WARPS + warp] = sum;
        partial[2 * CHUNK_WARPS + warp] = squares;
    }
}

template <class A>
__device__ __forceinline__ Moments<A> chunk_moments(const A* partial, int n, A q) {
    const A sum = ordered_sum<CHUNK_WARPS>(partial + CHUNK_WARPS);
    const A squares = ordered_sum<CHUNK_WARPS>(partial + 2 * CHUNK_WARPS);
    return corrected(chunk_mean(partial, n), sum, squares, q, (A)n);
}

template <class A>
__device__ __forceinline__ Run<A> run_of(const Moments<A>& m, A count, A shift) {
    return Run<A>{count, (m.hi - shift) + m.lo, m.m2q};
}
