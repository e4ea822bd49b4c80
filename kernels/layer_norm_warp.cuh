// K1: rows of up to 4 KiB. LANES lanes hold ROWS rows in registers; shuffles only.
//
// A block of THREADS threads has THREADS / LANES groups of lanes; group g takes the rows
// first + r * groups + g, so that for each r the rows of a warp lie next to each other.

template <int THREADS, int LANES, int VECS, int ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_warp(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int GROUPS = THREADS / LANES;
    const int lane = threadIdx.x % LANES;
    const i64 first = (i64)blockIdx.x * (GROUPS * ROWS) + threadIdx.x / LANES;
    const int N = (int)a.N;
    const A q = scale_for<A>(a.N);

    Segment<LANES, VECS> s[ROWS];
    RowStats<A> stats[ROWS];
    int skew[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r * GROUPS;
        // A group without a row stays: the shuffles of its warp name all lanes.
        const X* p = a.x + (row < a.rows ? row_offset(row, a.rows, a.M, a.x_outer, a.x_row) : 0);
        skew[r] = skew_of(p);
        load_granules(s[r], p, row < a.rows ? N : 0, lane);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        granules_to_columns<LANES, VECS, X>(s[r], skew[r], lane);
        const A mean = warp_sum<LANES>(lane_sum<X, A>(s[r].v)) / (A)N;
        A sum, squares;
        lane_deviations<LANES, X>(s[r].v, mean, q, N, lane, sum, squares);
        sum = warp_sum<LANES>(sum);
        squares = warp_sum<LANES>(squares);
        stats[r] = row_stats(corrected(mean, sum, squares, q, (A)N), q, a.N, a.eps);
    }
    normalize_segments<LANES, VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(s, stats, a.weight, a.bias, 0, N, lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r * GROUPS;
        const bool live = row < a.rows;
        X* p = a.y + (live ? row_offset(row, a.rows, a.M, a.y_outer, a.y_row) : 0);
        store_columns(s[r], p, live ? N : 0, lane);
        if (live && lane == 0) store_stats(a.mean, a.rstd, row, stats[r]);
    }
}
