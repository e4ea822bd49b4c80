// K3: rows beyond 32 KiB that fit shared memory, one block per row.
//
// The row is staged in shared memory, a chunk at a time: the sums of a chunk begin when it has arrived,
// while the chunks after it are on their way. Where registers carry it (sm_75) a thread reads back
// what it wrote itself.
// Shared memory: Vec row[ceil(N / V) + 1], u64 arrived[chunks] (neither the one more nor these where
// registers carry the row), then A partial[chunks][CHUNK_PARTIALS]; at most 32 chunks.

// Brings the row through registers; it then lies in columns.
template <int GROUPS, class X>
__device__ __forceinline__ void carry_row(
    StagedRow<X>& row, const X* x, int N, int chunks, int group, int warp, int lane) {
    constexpr int V = PerVec<X>::count;
    Segment<32, CHUNK_VECS> s;
    for (int c = group; c < chunks; c += GROUPS) {
        const WarpPart<X> part(N, c, warp);
        load_granules(s, x + (part.n ? part.first : 0), part.n, lane);
        granules_to_columns<32, CHUNK_VECS, X>(s, row.skew, lane);
#pragma unroll
        for (int k = 0; k < CHUNK_VECS; ++k)
            if ((k * 32 + lane) * V < part.n) row.at[part.first / V + k * 32 + lane] = s.v[k];
    }
    row.skew = 0;
}

template <int THREADS, int STAGING, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_shared(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int GROUPS = THREADS / CHUNK_THREADS, COLS = Chunk<X>::cols;
    constexpr bool COPIED = STAGING != STAGE_REGISTERS;
    DYNAMIC_SHARED(shared);
    const int N = (int)a.N;
    const int chunks = (N + COLS - 1) / COLS;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    const i64 row = blockIdx.x;
    const X* x = a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row);
    X* y = a.y + row_offset(row, a.rows, a.M, a.y_outer, a.y_row);
    const A q = scale_for<A>(a.N);
    StagedRow<X> staged((Vec*)shared, x, N);
    u64* arrived = (u64*)(staged.at + staged.vecs + COPIED);
    A* partials = (A*)(arrived + (COPIED ? chunks : 0));
    if (COPIED)
        start_row<STAGING, THREADS>(staged, arrived, chunks);
    else
        carry_row<GROUPS>(staged, x, N, chunks, group, warp, lane);

    Segment<32, CHUNK_VECS> s[1];
    for (int c = group; c < chunks; c += GROUPS) {
        if (COPIED) wait_for_chunk(staged, arrived, c);
        take_part(s[0], staged, WarpPart<X>(N, c, warp), lane);
        const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
        if (lane == 0) partials[c * CHUNK_PARTIALS + warp] = sum;
    }
    __syncthreads();
    for (int c = group; c < chunks; c += GROUPS) {
        const WarpPart<X> part(N, c, warp);
        A* partial = partials + c * CHUNK_PARTIALS;
        take_part(s[0], staged, part, lane);
        A sum, squares;
        lane_deviations<32, X>(
            s[0].v, chunk_mean(partial, at_most(N - c * COLS, COLS)), q, part.n, lane, sum, squares);
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
        const WarpPart<X> part(N, c, warp);
        take_part(s[0], staged, part, lane);
        normalize_segments<32, CHUNK_VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(
            s, stats, a.weight, a.bias, part.first, part.n, lane);
        store_columns(s[0], y + (part.n ? part.first : 0), part.n, lane);
    }
}
