// K5: few rows of huge N, or rows beyond shared memory. Two kernels of 256 threads a block: the first
// leaves the moments of every section of a row in a workspace, the second merges them and
// normalizes. No cooperative launch, no spinning, no atomics: the launch order is the only barrier.
//
// A section is `chunks_per_section` chunks (one, until a row has more than 512). Workspace:
// A moments[rows][sections][3].

template <class X>
__device__ __forceinline__ i64 section_count(i64 N, i64 section, i64 chunks_per_section) {
    const i64 cols = chunks_per_section * Chunk<X>::cols;
    const i64 left = N - section * cols;
    return left < cols ? left : cols;
}

template <class X, class A>
__device__ __forceinline__ void layer_norm_fwd_split_stats(
    const X* x, A* moments, i64 rows, i64 M, i64 x_outer, i64 x_row, i64 N, i64 sections, i64 chunks_per_section) {
    DYNAMIC_SHARED(shared);
    A* partial = (A*)shared;  // A partial[3][CHUNK_WARPS]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 row = blockIdx.x / sections, section = blockIdx.x - row * sections;
    const X* p = x + row_offset(row, rows, M, x_outer, x_row);
    const A q = scale_for<A>(N);
    const i64 begin = section * chunks_per_section * Chunk<X>::cols;
    const i64 end = begin + section_count<X>(N, section, chunks_per_section);

    Moments<A> first = {0, 0, 0};
    Run<A> run = {0, 0, 0};
    for (i64 c = begin; c < end; c += Chunk<X>::cols) {
        const i64 col = c + warp * Chunk<X>::warp_cols;
        const int n = at_most(N - col, Chunk<X>::warp_cols);
        const int count = at_most(N - c, Chunk<X>::cols);
        Segment<32, CHUNK_VECS> s;
        load_granules(s, p + (n ? col : 0), n, lane);
        granules_to_columns<32, CHUNK_VECS, X>(s, skew_of(p), lane);
        A sum = warp_sum<32>(lane_sum<X, A>(s.v));
        if (lane == 0) partial[warp] = sum;
        __syncthreads();
        A squares;
        lane_deviations<32, X>(s.v, chunk_mean(partial, count), q, n, lane, sum, squares);
        put_deviations(partial, warp, lane, sum, squares);
        __syncthreads();
        const Moments<A> m = chunk_moments(partial, count, q);
        if (c == begin) first = m;
        // The next chunk's sums overwrite partial[0], which chunk_moments reads.
        if (c + Chunk<X>::cols < end) __syncthreads();
        run = merge(run, run_of(m, (A)count, first.hi), q);
    }
    if (threadIdx.x == 0) {
        A* to = moments + 3 * (i64)blockIdx.x;
        to[0] = first.hi;
        to[1] = run.mean;
        to[2] = run.m2q;
    }
}

template <class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ void layer_norm_fwd_split_normalize(
    const RowArguments<X, W, B>& a, const A* moments, i64 sections, i64 chunks_per_section, i64 parts) {
    DYNAMIC_SHARED(shared);
    Run<A>* runs = (Run<A>*)shared;  // [CHUNK_WARPS]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Backwards: what the first kernel read last is still in L2.
    const i64 index = (i64)gridDim.x - 1 - blockIdx.x;
    const i64 row = index / parts, part = index - row * parts;
    const A q = scale_for<A>(a.N);

    const A* mine = moments + row * sections * 3;
    const A shift = mine[0];
    Run<A> run = {0, 0, 0};
    for (i64 i = threadIdx.x; i < sections; i += CHUNK_THREADS) {
        const Moments<A> m = {mine[3 * i], mine[3 * i + 1], mine[3 * i + 2]};
        run = merge(run, run_of(m, (A)section_count<X>(a.N, i, chunks_per_section), shift), q);
    }
    run = warp_merge(run, q);
    if (lane == 0) runs[warp] = run;
    __syncthreads();
    run = runs[0];
#pragma unroll
    for (int w = 1; w < CHUNK_WARPS; ++w) run = merge(run, runs[w], q);
    const RowStats<A> stats[1] = {row_stats(Moments<A>{shift, run.mean, run.m2q}, q, a.N, a.eps)};
    if (part == 0 && threadIdx.x == 0) store_stats(a.mean, a.rstd, row, stats[0]);

    const X* x = a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row);
    X* y = a.y + row_offset(row, a.rows, a.M, a.y_outer, a.y_row);
    const i64 chunks = (a.N + Chunk<X>::cols - 1) / Chunk<X>::cols;
    const i64 per_part = (chunks + parts - 1) / parts;
    const i64 begin = part * per_part;
    const i64 end = begin + per_part < chunks ? begin + per_part : chunks;
    for (i64 c = end - 1; c >= begin; --c) {
        const i64 col = c * Chunk<X>::cols + warp * Chunk<X>::warp_cols;
        const int n = at_most(a.N - col, Chunk<X>::warp_cols);
        Segment<32, CHUNK_VECS> s[1];
        load_granules(s[0], x + (n ? col : 0), n, lane);
        granules_to_columns<32, CHUNK_VECS, X>(s[0], skew_of(x), lane);
        normalize_segments<32, CHUNK_VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(s, stats, a.weight, a.bias, col, n, lane);
        store_columns(s[0], y + (n ? col : 0), n, lane);
    }
}
