// K2: rows of 4 to 32 KiB. THREADS_PER_ROW threads hold a row in registers; each warp owns a run of
// neighbouring columns; one exchange through shared memory per reduction.
//
// Shared memory: A partial[rows_per_block][3][WARPS]: sums, then deviations and their squares. Each
// part is written once and read once, so one barrier per reduction is enough.

template <int THREADS, int THREADS_PER_ROW, int VECS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_block(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int WARPS = THREADS_PER_ROW / 32;
    constexpr int COLS = 32 * VECS * PerVec<X>::count;  // columns of one warp
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % THREADS_PER_ROW / 32;
    const int row_in_block = threadIdx.x / THREADS_PER_ROW;
    A* partial = (A*)shared + row_in_block * 3 * WARPS;
    const i64 row = (i64)blockIdx.x * (THREADS / THREADS_PER_ROW) + row_in_block;
    const bool live = row < a.rows;
    const int first = warp * COLS;
    const int n = live ? at_most(a.N - first, COLS) : 0;
    const A q = scale_for<A>(a.N);
    const A N = (A)a.N;

    Segment<32, VECS> s[1];
    const X* p = a.x + (live ? row_offset(row, a.rows, a.M, a.x_outer, a.x_row) + first : 0);
    load_granules(s[0], p, n, lane);
    granules_to_columns<32, VECS, X>(s[0], skew_of(p), lane);

    A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    const A mean = ordered_sum<WARPS>(partial) / N;
    A squares;
    lane_deviations<32, X>(s[0].v, mean, q, n, lane, sum, squares);
    sum = warp_sum<32>(sum);
    squares = warp_sum<32>(squares);
    if (lane == 0) {
        partial[WARPS + warp] = sum;
        partial[2 * WARPS + warp] = squares;
    }
    __syncthreads();
    sum = ordered_sum<WARPS>(partial + WARPS);
    squares = ordered_sum<WARPS>(partial + 2 * WARPS);
    const RowStats<A> stats[1] = {row_stats(corrected(mean, sum, squares, q, N), q, a.N, a.eps)};

    normalize_segments<32, VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(s, stats, a.weight, a.bias, first, n, lane);
    X* to = a.y + (live ? row_offset(row, a.rows, a.M, a.y_outer, a.y_row) + first : 0);
    store_columns(s[0], to, n, lane);
    if (live && threadIdx.x % THREADS_PER_ROW == 0) store_stats(a.mean, a.rstd, row, stats[0]);
}
