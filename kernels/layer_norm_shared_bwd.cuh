// K3 backward: rows beyond K2's whose dweight and dbias fit shared memory. As K2, but the sums over
// rows lie in shared memory. Where x and dy of one row fit beside them, the next row is copied there
// while a row is worked on, and costs no registers. Elsewhere it is fetched into registers if they hold
// it (AHEAD).
//
// Shared memory: SharedTotals, then A sums[2][3][WARPS]; with copies then Vec x[vecs + 1], dy[vecs + 1],
// stats, u64 arrival.

// The row that comes next, copied to shared memory.
template <int STAGING, bool AHEAD, int THREADS, int VECS, class X>
struct NextGradient {
    typedef typename Accumulator<X>::type A;
    StagedRow<X> x, dy;
    Vec* stats;  // mean and rstd
    u64* arrival;
    u32 phase;
    // What a few threads bring through registers: x's ends in the second warp, dy's in the third, the
    // statistics in the fourth. It is loaded when the copies start, and put in its place later.
    Vec carried;

    __device__ __forceinline__ NextGradient(void* at, int N)
        : x((Vec*)at, (const X*)0, N), dy(x.at + x.vecs + 1, (const X*)0, N), phase(0) {
        stats = dy.at + x.vecs + 1;
        arrival = (u64*)(stats + 1);
        if (threadIdx.x == 0) arrival_init(arrival, arrivals<STAGING, THREADS>());
        __syncthreads();
    }

    template <class W>
    __device__ __forceinline__ void start(const GradientArguments<X, W>& a, i64 row, i64, int, int) {
        if (row >= a.rows) return;
        x = StagedRow<X>(x.at, a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row), (int)a.N);
        dy = StagedRow<X>(dy.at, a.dy + row_offset(row, a.rows, a.M, a.dy_outer, a.dy_row), (int)a.N);
        const int x_granules = x.granules_of(0, x.vecs), dy_granules = dy.granules_of(0, dy.vecs);
        if (STAGING == STAGE_BULK && threadIdx.x == 0) {
            fence_bulk();
            arrive_expecting(arrival, 16 * (x_granules + dy_granules));
        }
        x.template copy<STAGING, THREADS>(0, x_granules, arrival);
        dy.template copy<STAGING, THREADS>(0, dy_granules, arrival);
        if (STAGING == STAGE_ASYNC) arrive_with_copies(arrival);
        if (threadIdx.x / 2 == 16) carried = x.load_edge(threadIdx.x % 2);
        if (threadIdx.x / 2 == 32) carried = dy.load_edge(threadIdx.x % 2);
        if (threadIdx.x == 96) {
            const A t[16 / sizeof(A)] = {a.mean[row], a.rstd[row]};
            pack(carried, t, (const A*)0);
        }
    }

    // To be called between `start` and a barrier that comes before the row is taken.
    __device__ __forceinline__ void put_carried() const {
        if (threadIdx.x / 2 == 16) x.put_edge(threadIdx.x % 2, carried);
        if (threadIdx.x / 2 == 32) dy.put_edge(threadIdx.x % 2, carried);
        if (threadIdx.x == 96) *stats = carried;
    }

    template <class W>
    __device__ __forceinline__ void take(
        GradientRow<32, VECS, A>& r, const GradientArguments<X, W>&, i64, i64, int, int lane) {
        wait_for(arrival, phase);
        phase ^= 1;
        const int mine = threadIdx.x / 32 * 32 * VECS + lane;
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
            r.x.v[k] = x.columns(mine + k * 32);
            r.dy.v[k] = dy.columns(mine + k * 32);
        }
        A t[16 / sizeof(A)];
        unpack(load_shared16(stats), t, (const A*)0);
        r.mean = t[0];
        r.rstd = t[1];
        __syncthreads();  // before the next copies
    }
    __device__ __forceinline__ void settle(GradientRow<32, VECS, A>&, int) const {}
};

// The same in registers, or fetched when it is its turn.
template <bool AHEAD, int THREADS, int VECS, class X>
struct NextGradient<STAGE_REGISTERS, AHEAD, THREADS, VECS, X> {
    typedef typename Accumulator<X>::type A;
    GradientRow<32, VECS, A> next;

    __device__ __forceinline__ NextGradient(void*, int) {}
    template <class W>
    __device__ __forceinline__ void start(const GradientArguments<X, W>& a, i64 row, i64 first, int n, int lane) {
        if (AHEAD) fetch(next, a, row, first, n, lane);
    }
    __device__ __forceinline__ void put_carried() const {}
    template <class W>
    __device__ __forceinline__ void take(
        GradientRow<32, VECS, A>& r, const GradientArguments<X, W>& a, i64 row, i64 first, int n, int lane) {
        if (AHEAD)
            r = next;
        else
            fetch(r, a, row, first, n, lane);
    }
    __device__ __forceinline__ void settle(GradientRow<32, VECS, A>& r, int lane) const { to_columns<X>(r, lane); }
};

template <
    int THREADS, int VECS, int STAGING, bool AHEAD, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_shared(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int WARPS = THREADS / 32;
    constexpr int COLS = 32 * VECS * V;  // columns of one warp
    typedef SharedTotals<THREADS, A, V> Totals;
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = warp * COLS;
    const int n = at_most(a.N - first, COLS);
    Totals totals = {shared + 16 * threadIdx.x, DWEIGHT ? VECS * Totals::PER_VEC : 0};
    A* sums = (A*)(shared + ((int)DWEIGHT + (int)DBIAS) * VECS * Totals::PER_VEC);
    totals.template clear<VECS, DWEIGHT, DBIAS>();

    NextGradient<STAGING, AHEAD, THREADS, VECS, X> next(sums + 2 * 3 * WARPS, (int)a.N);
    next.start(a, blockIdx.x, first, n, lane);
    next.put_carried();
    if (STAGING != STAGE_REGISTERS) __syncthreads();
    int half = 0;
    for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        GradientRow<32, VECS, A> r;
        next.take(r, a, row, first, n, lane);
        next.start(a, row + gridDim.x, first, n, lane);
        next.settle(r, lane);
        const GradientSums<A> mine = lane_sums<X, HAS_WEIGHT>(r, a.weight, first, n, lane);
        if (row + gridDim.x < a.rows) next.put_carried();
        const RowGradient<A> c = row_gradient(block_sums<WARPS>(sums + half, mine, warp, lane), a.N);
        half = 3 * WARPS - half;
        differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r, c, a.weight, first, n, lane, totals);
        store_dx<DX>(r, a, row, first, n, lane);
    }
    totals.template leave<X, VECS, DWEIGHT, DBIAS>(a.partials, blockIdx.x, gridDim.x, a.N, first, n, lane);
}
