// K2 backward: rows of up to 16 KiB, one block per row at a time. Each warp owns a run of neighbouring
// columns, for which its threads keep dweight and dbias in registers from row to row; the next row is
// on its way while one is worked on.
//
// Shared memory: A sums[2][3][WARPS]. A row uses one half; a warp that is ahead writes the other half,
// and cannot come round to this one before the next barrier.

template <int THREADS, int VECS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_block(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int WARPS = THREADS / 32;
    constexpr int COLS = 32 * VECS * V;  // columns of one warp
    DYNAMIC_SHARED(shared);
    A* sums = (A*)shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = warp * COLS;
    const int n = at_most(a.N - first, COLS);

    RegisterTotals<VECS, A, V> totals;
    totals.clear();
    GradientRow<32, VECS, A> next;
    fetch(next, a, blockIdx.x, first, n, lane);
    int half = 0;
    for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        GradientRow<32, VECS, A> r = next;
        fetch(next, a, row + gridDim.x, first, n, lane);
        to_columns<X>(r, lane);
        const GradientSums<A> mine = lane_sums<X, HAS_WEIGHT>(r, a.weight, first, n, lane);
        const RowGradient<A> c = row_gradient(block_sums<WARPS>(sums + half, mine, warp, lane), a.N);
        half = 3 * WARPS - half;
        differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r, c, a.weight, first, n, lane, totals);
        store_dx<DX>(r, a, row, first, n, lane);
    }
    put_totals<X, DWEIGHT, DBIAS, 32>(a.partials, blockIdx.x, gridDim.x, a.N, totals, first, n, lane);
}
