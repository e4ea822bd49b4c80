// K3: rows beyond 32 KiB that fit shared memory, one block per row.
//
// The row is staged in shared memory as vectors in column order. Each thread reads back only what it
// wrote itself, so the barriers are those of the two reductions alone.
// Shared memory: Vec row[ceil(N / V)], then A partial[chunks][CHUNK_PARTIALS]; at most 32
// chunks.

template <int THREADS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_shared(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int GROUPS = THREADS / CHUNK_THREADS;
    constexpr int COLS = Chunk<X>::cols, WARP_COLS = Chunk<X>::warp_cols;
    DYNAMIC_SHARED(shared);
    const int N = (int)a.N;
    const int chunks = (N + COLS - 1) / COLS;
    Vec* staged = (Vec*)shared;
    A* partials = (A*)(staged + (N + V - 1) / V);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    const i64 row = blockIdx.x;
    const X* x = a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row);
    X* y = a.y + row_offset(row, a.rows, a.M, a.y_outer, a.y_row);
    const A q = scale_for<A>(a.N);

    Segment<32, CHUNK_VECS> s[1];
    for (int c = group; c < chunks; c += GROUPS) {
        const int first = c * COLS + warp * WARP_COLS;
        const int n = at_most(N - first, WARP_COLS);
        load_granules(s[0], x + (n ? first : 0), n, lane);
        granules_to_columns<32, CHUNK_VECS, X>(s[0], skew_of(x), lane);
#pragma unroll
        for (int k = 0; k < CHUNK_VECS; ++k)
            if ((k * 32 + lane) * V < n) staged[first / V + k * 32 + lane] = s[0].v[k];
        const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
        if (lane == 0) partials[c * CHUNK_PARTIALS + warp] = sum;
    }
    __syncthreads();
    for (int c = group; c < chunks; c += GROUPS) {
        const int first = c * COLS + warp * WARP_COLS;
        const int n = at_most(N - first, WARP_COLS);
        A* partial = partials + c * CHUNK_PARTIALS;
#pragma unroll
        for (int k = 0; k < CHUNK_VECS; ++k) {
            if ((k * 32 + lane) * V < n)
                s[0].v[k] = staged[first / V + k * 32 + lane];
            else
                s[0].v[k] = Vec{{0u, 0u, 0u, 0u}};
        }
        A sum, squares;
        lane_deviations<32, X>(s[0].v, chunk_mean(partial, at_most(N - c * COLS, COLS)), q, n, lane, sum, squares);
        put_deviations(partial, warp, lane, sum, squares);
    }
    __syncthreads();
    const A shift = chunk_mean(partials, at_most(N, COLS));
    Run<A> run = {0, 0, 0};
    if (lane < chunks) {
        const int n = at_most(N - lane * COLS, COLS);
        run = run_of(chunk_moments(partials + lane * CHUNK_PARTIALS, n, q), (A)n, shift);
    }
    run = warp_merge(run, q);
    const RowStats<A> stats[1] = {row_stats(Moments<A>{shift, run.mean, run.m2q}, q, a.N, a.eps)};
    if (threadIdx.x == 0) store_stats(a.mean, a.rstd, row, stats[0]);

    for (int c = group; c < chunks; c += GROUPS) {
        const int first = c * COLS + warp * WARP_COLS;
        const int n = at_most(N - first, WARP_COLS);
#pragma unroll
        for (int k = 0; k < CHUNK_VECS; ++k)
            if ((k * 32 + lane) * V < n) s[0].v[k] = staged[first / V + k * 32 + lane];
        normalize_segments<32, CHUNK_VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(s, stats, a.weight, a.bias, first, n, lane);
        store_columns(s[0], y + (n ? first : 0), n, lane);
    }
}
