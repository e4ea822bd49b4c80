// K1 and K2: a row in the registers of some lanes of a warp, or of a block. Forward and backward.

// ---- K1: rows of up to 4 KiB --------------------------------------------------------------------------
// LANES lanes hold ROWS rows in registers; shuffles only.
//
// A block of THREADS threads has THREADS / LANES groups of lanes; group g takes the rows
// first + r * groups + g, so that for each r the rows of a warp lie next to each other.

template <class Op, bool ALIGNED, int THREADS, int LANES, int VECS, int ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_warp(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int GROUPS = THREADS / LANES, V = PerVec<X>::count;
    // Beside 4 * VECS * ROWS registers of x.
    constexpr int MOST = VECS * ROWS == 2 ? 20 : sizeof(X) < 8 && (ALIGNED || ROWS == 2) ? 48 : 32;
    constexpr bool HELD = holds_affine<X, W, B, HAS_WEIGHT, HAS_BIAS, VECS>(MOST - 4 * VECS * ROWS);
    const int lane = threadIdx.x % LANES;
    const i64 first = (i64)blockIdx.x * (GROUPS * ROWS) + threadIdx.x / LANES;
    const int N = (int)a.N;
    const A p = factor_for<A>(a.N);

    LoadedRow<Op, LANES, VECS> loaded[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r * GROUPS;
        // A group without a row stays: the shuffles of its warp name all lanes.
        load_row<Op, ALIGNED>(loaded[r], a, row, 0, row < a.rows ? N : 0, lane);
    }
    const Affine<HAS_WEIGHT, HELD, ALIGNED, LANES, VECS, V, W> weight(a.weight, N, lane);
    const Affine<HAS_BIAS, HELD, ALIGNED, LANES, VECS, V, B> bias(a.bias, N, lane);
    Segment<LANES, VECS> s[ROWS];
    RowStats<A> stats[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r * GROUPS;
        take_row<Op, ALIGNED>(loaded[r], a, row, 0, row < a.rows ? N : 0, lane);
        s[r] = loaded[r].x;
        Look<Op, X> look;
        if (Op::center) look.mean = warp_sum<LANES>(lane_sum<X, A>(s[r].v)) / (A)N;
        Moments<A> m;
        bool open = true;
        for (;;) {
            A sum, squares;
            lane_deviations<Op, ALIGNED, LANES, X>(s[r].v, look.mean, look.scale, p, N, lane, sum, squares);
            if (Op::center) sum = warp_sum<LANES>(sum);
            squares = warp_sum<LANES>(squares);
            if (open) {  // else it is another row of the warp that is looked at again
                m = corrected<Op>(look.mean, sum, squares, p, (A)N);
                open = look.next(m.hi, m.lo, m.m2, a.N, a.eps);
            }
            if (Range<X>::everywhere || !__any_sync(0xffffffffu, open)) break;
        }
        stats[r] = row_stats(m, p, look.scale, (A)N, a.eps);
    }
    X* y[ROWS];
    int n[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r * GROUPS;
        n[r] = row < a.rows ? N : 0;
        y[r] = row_at(a.y, a, a.y_outer, a.y_row, row, 0, n[r]);
        if (n[r] && lane == 0) store_stats(a.mean, a.rstd, row, stats[r]);
    }
    normalize_to<Op>(y, n, s, stats, weight, bias, lane);
}

// ---- K2: rows of 4 to 32 KiB --------------------------------------------------------------------------
// The threads of a block hold a row in registers; each warp owns a run of neighbouring columns; one
// exchange through shared memory per reduction.
//
// Shared memory: A partial[3][WARPS]: sums, then deviations and their squares. Each part is written once
// and read once, so one barrier per reduction is enough.

template <class Op, bool ALIGNED, int THREADS, int VECS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_block(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int WARPS = THREADS / 32, V = PerVec<X>::count;
    constexpr int COLS = 32 * VECS * V;  // columns of one warp
    constexpr bool HELD = holds_affine<X, W, B, HAS_WEIGHT, HAS_BIAS, VECS>(32);
    DYNAMIC_SHARED(shared);
    A* partial = (A*)shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 row = blockIdx.x;
    const int first = warp * COLS;
    const int n = at_most(a.N - first, COLS);
    const A p = factor_for<A>(a.N), N = (A)a.N;

    LoadedRow<Op, 32, VECS> loaded;
    load_row<Op, ALIGNED>(loaded, a, row, first, n, lane);
    const Affine<HAS_WEIGHT, HELD, ALIGNED, 32, VECS, V, W> weight(a.weight + first, n, lane);
    const Affine<HAS_BIAS, HELD, ALIGNED, 32, VECS, V, B> bias(a.bias + first, n, lane);
    take_row<Op, ALIGNED>(loaded, a, row, first, n, lane);
    Segment<32, VECS> s[1] = {loaded.x};

    Look<Op, X> look;
    if (Op::center) {
        const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
        if (lane == 0) partial[warp] = sum;
        __syncthreads();
        look.mean = ordered_sum<WARPS>(partial) / N;
    }
    Moments<A> m;
    for (;;) {
        A sum, squares;
        lane_deviations<Op, ALIGNED, 32, X>(s[0].v, look.mean, look.scale, p, n, lane, sum, squares);
        if (Op::center) sum = warp_sum<32>(sum);
        squares = warp_sum<32>(squares);
        if (lane == 0) {
            partial[WARPS + warp] = sum;
            partial[2 * WARPS + warp] = squares;
        }
        __syncthreads();
        if (Op::center) sum = ordered_sum<WARPS>(partial + WARPS);
        squares = ordered_sum<WARPS>(partial + 2 * WARPS);
        m = corrected<Op>(look.mean, sum, squares, p, N);
        if (!look.next(m.hi, m.lo, m.m2, a.N, a.eps)) break;  // of all threads or of none
        __syncthreads();
    }
    const RowStats<A> stats[1] = {row_stats(m, p, look.scale, N, a.eps)};

    if (threadIdx.x == 0) store_stats(a.mean, a.rstd, row, stats[0]);
    X* const y[1] = {row_at(a.y, a, a.y_outer, a.y_row, row, first, n)};
    const int of_row[1] = {n};
    normalize_to<Op>(y, of_row, s, stats, weight, bias, lane);
}

// ---- K1 backward: rows of up to 1 KiB -------------------------------------------------------------------
// LANES lanes hold a row of x and dy in registers, and the next row is on its way while one is worked on.
// The grid is as large as the device holds: each group of lanes goes on to the row that lies
// gridDim * groups further, and keeps weight, dweight and dbias in registers.
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

template <class Op, bool ALIGNED, int THREADS, int LANES, int VECS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void norm_bwd_warp(const GradientArguments<X, W>& a) {
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
    fetch<Op, ALIGNED>(next, a, row, 0, N, lane);
    const Affine<HAS_WEIGHT, true, ALIGNED, LANES, VECS, V, W> weight(a.weight, N, lane);
    // By the block's first row: the shuffles name all lanes, so all groups of a warp go on together.
    for (i64 first = (i64)blockIdx.x * GROUPS; first < a.rows; first += step, row += step) {
        GradientRow<LANES, VECS, A> r = next;
        fetch<Op, ALIGNED>(next, a, row + step, 0, N, lane);
        to_columns<ALIGNED, X>(r, N, lane);
        const GradientSums<A> sums =
            warp_sum<Op, LANES>(lane_sums<Op, HAS_WEIGHT, ALIGNED, X>(r, weight, N, lane));
        const RowGradient<A> c = row_gradient<Op>(sums, a.N);
        // A group without a row holds zeros: they add nothing, and none of it is written.
        finish_row<Op, DX, DWEIGHT, DBIAS, HAS_WEIGHT, ALIGNED>(r, c, a, weight, row, 0, N, lane, totals);
    }
    if (!DWEIGHT && !DBIAS) return;
    add_groups<LANES, VECS, A, V, DWEIGHT, DBIAS>(totals);
    const int warp = threadIdx.x / 32;
    add_warps<THREADS / 32, LANES, VECS, A, V, DWEIGHT, DBIAS>(totals, shared, warp, threadIdx.x % 32);
    if (warp == THREADS / 32 - 1 && threadIdx.x % 32 < LANES)
        put_totals<X, DWEIGHT, DBIAS, LANES>(a.partials, blockIdx.x, gridDim.x, a.N, totals, 0, N, lane);
}

// ---- K2 backward: rows of up to 16 KiB ------------------------------------------------------------------
// One block per row at a time. Each warp owns a run of neighbouring columns, for which its threads keep
// weight, dweight and dbias in registers from row to row; the next row is on its way while one is worked on.
//
// Shared memory: A sums[2][3][WARPS]. A row uses one half; a warp that is ahead writes the other half,
// and cannot come round to this one before the next barrier.

template <class Op, bool ALIGNED, int THREADS, int VECS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void norm_bwd_block(const GradientArguments<X, W>& a) {
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
    fetch<Op, ALIGNED>(next, a, blockIdx.x, first, n, lane);
    const Affine<HAS_WEIGHT, true, ALIGNED, 32, VECS, V, W> weight(a.weight + first, n, lane);
    int half = 0;
    for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        GradientRow<32, VECS, A> r = next;
        fetch<Op, ALIGNED>(next, a, row + gridDim.x, first, n, lane);
        to_columns<ALIGNED, X>(r, n, lane);
        const GradientSums<A> mine = lane_sums<Op, HAS_WEIGHT, ALIGNED, X>(r, weight, n, lane);
        const RowGradient<A> c = row_gradient<Op>(block_sums<Op, WARPS>(sums + half, mine, warp, lane), a.N);
        half = 3 * WARPS - half;
        finish_row<Op, DX, DWEIGHT, DBIAS, HAS_WEIGHT, ALIGNED>(r, c, a, weight, row, first, n, lane, totals);
    }
    put_totals<X, DWEIGHT, DBIAS, 32>(a.partials, blockIdx.x, gridDim.x, a.N, totals, first, n, lane);
}
