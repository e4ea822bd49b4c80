// K1 backward: rows of up to 1 KiB. LANES lanes hold a row of x and dy in registers, and the next row
// is on its way while one is worked on. The grid is as large as the device holds: each group of lanes
// goes on to the row that lies gridDim * groups further, and keeps its dweight and dbias in registers.
//
// Shared memory: A totals[2][LANES * VECS * V], for the warps to add theirs up in their order.

template <int LANES, int VECS, class A, int V, bool DWEIGHT, bool DBIAS>
__device__ __forceinline__ void add_groups(RegisterTotals<VECS, A, V>& t) {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
                if (DWEIGHT) t.dweight[k][i] += __shfl_xor_sync(0xffffffffu, t.dweight[k][i], step, 32);
                if (DBIAS) t.dbias[k][i] += __shfl_xor_sync(0xffffffffu, t.dbias[k][i], step, 32);
            }
        }
    }
}

// After warp w's turn shared memory holds the sums of warps 0 to w; the last warp keeps them.
template <int WARPS, int LANES, int VECS, class A, int V, bool DWEIGHT, bool DBIAS>
__device__ __forceinline__ void add_warps(RegisterTotals<VECS, A, V>& t, unsigned char* shared, int warp, int lane) {
    constexpr int PIECES = Pieces<A, V>::count;
#pragma unroll 1
    for (int turn = 0; turn < WARPS; ++turn) {
        if (turn) __syncthreads();
        if (turn != warp || lane >= LANES) continue;
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
            unsigned char* dweight = shared + (k * PIECES * LANES + lane) * 16;
            unsigned char* dbias = dweight + VECS * PIECES * LANES * 16;
            if (turn) {
                A before[V];
                if (DWEIGHT) {
                    get_pieces(dweight, LANES, before);
#pragma unroll
                    for (int i = 0; i < V; ++i) t.dweight[k][i] += before[i];
                }
                if (DBIAS) {
                    get_pieces(dbias, LANES, before);
#pragma unroll
                    for (int i = 0; i < V; ++i) t.dbias[k][i] += before[i];
                }
            }
            if (turn < WARPS - 1) {
                if (DWEIGHT) put_pieces(dweight, LANES, t.dweight[k]);
                if (DBIAS) put_pieces(dbias, LANES, t.dbias[k]);
            }
        }
    }
}

template <int THREADS, int LANES, int VECS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_warp(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int GROUPS = THREADS / LANES;
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % LANES;
    const int N = (int)a.N;
    const i64 step = (i64)gridDim.x * GROUPS;
    i64 row = (i64)blockIdx.x * GROUPS + threadIdx.x / LANES;

    RegisterTotals<VECS, A, V> totals;
    totals.clear();
    GradientRow<LANES, VECS, A> next;
    fetch(next, a, row, 0, N, lane);
    // By the block's first row: the shuffles name all lanes, so all groups of a warp go on together.
    for (i64 first = (i64)blockIdx.x * GROUPS; first < a.rows; first += step, row += step) {
        GradientRow<LANES, VECS, A> r = next;
        fetch(next, a, row + step, 0, N, lane);
        to_columns<X>(r, lane);
        const GradientSums<A> sums = warp_sum<LANES>(lane_sums<X, HAS_WEIGHT>(r, a.weight, 0, N, lane));
        const RowGradient<A> c = row_gradient(sums, a.N);
        // A group without a row holds zeros: they add nothing, and store_dx writes none of it.
        differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r, c, a.weight, 0, N, lane, totals);
        store_dx<DX>(r, a, row, 0, N, lane);
    }
    if (!DWEIGHT && !DBIAS) return;
    add_groups<LANES, VECS, A, V, DWEIGHT, DBIAS>(totals);
    const int warp = threadIdx.x / 32;
    add_warps<THREADS / 32, LANES, VECS, A, V, DWEIGHT, DBIAS>(totals, shared, warp, threadIdx.x % 32);
    if (warp == THREADS / 32 - 1 && threadIdx.x % 32 < LANES)
        put_totals<X, DWEIGHT, DBIAS, LANES>(a.partials, blockIdx.x, gridDim.x, a.N, totals, 0, N, lane);
}
