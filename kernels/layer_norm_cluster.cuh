// K4: long rows on sm_90 and newer, 2, 4 or 8 blocks per row.
//
// Each block stages a run of the row's chunks in its shared memory, as K3 does a whole row: several
// blocks fit on a multiprocessor, and one stores while others load. Each sends the moments of its chunks
// to all blocks of the cluster, and all merge them in the tree of K5, so that a row has the bits that
// K3 and K5 give it.
//
// Shared memory: Vec staged[most][CHUNK_THREADS * CHUNK_VECS] for the most chunks that a block holds,
// A partial[most][CHUNK_PARTIALS], A moments[chunks][3].

// Reads one warp's columns of a chunk, and keeps them. The only loads of x.
template <class X>
__device__ __forceinline__ void stage_columns(
    Segment<32, CHUNK_VECS>& s, Vec* to, const X* from, int n, int lane) {
    load_granules(s, from, n, lane);
    granules_to_columns<32, CHUNK_VECS, X>(s, skew_of(from), lane);
#pragma unroll
    for (int k = 0; k < CHUNK_VECS; ++k)
        if ((k * 32 + lane) * PerVec<X>::count < n) to[k * 32 + lane] = s.v[k];
}

// Each thread reads back only what it wrote itself.
template <class X>
__device__ __forceinline__ void staged_columns(Segment<32, CHUNK_VECS>& s, const Vec* from, int n, int lane) {
#pragma unroll
    for (int k = 0; k < CHUNK_VECS; ++k) {
        if ((k * 32 + lane) * PerVec<X>::count < n)
            s.v[k] = from[k * 32 + lane];
        else
            s.v[k] = Vec{{0u, 0u, 0u, 0u}};
    }
}

// The moments of all chunks of a row, merged as K5 merges its sections: 32 at a time, then those.
template <class X, class A>
__device__ __forceinline__ Moments<A> merge_chunks(const A* moments, int chunks, int N, A q, int lane) {
    const A shift = moments[0];
    Run<A> run = {0, 0, 0};
    for (int c = lane; c - lane < chunks; c += 32) {
        Run<A> mine = {0, 0, 0};
        if (c < chunks) {
            const Moments<A> m = {moments[3 * c], moments[3 * c + 1], moments[3 * c + 2]};
            mine = run_of(m, (A)at_most(N - c * Chunk<X>::cols, Chunk<X>::cols), shift);
        }
        run = merge(run, warp_merge(mine, q), q);
    }
    return Moments<A>{shift, run.mean, run.m2q};
}

template <int CLUSTER, int THREADS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_cluster(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int GROUPS = THREADS / CHUNK_THREADS, WARP_VECS = 32 * CHUNK_VECS;
    constexpr int COLS = Chunk<X>::cols, WARP_COLS = Chunk<X>::warp_cols;
    DYNAMIC_SHARED(shared);
    const int rank = cluster_rank();
    cluster_arrive();  // this block has started
    const int N = (int)a.N;
    const int chunks = (N + COLS - 1) / COLS, most = (chunks + CLUSTER - 1) / CLUSTER;
    const ChunkRun own = chunks_of_block<CLUSTER>(chunks, rank);
    A* partials = (A*)((Vec*)shared + most * CHUNK_WARPS * WARP_VECS);
    A* moments = partials + most * CHUNK_PARTIALS;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    Vec* staged = (Vec*)shared + warp * WARP_VECS;
    const i64 row = blockIdx.x / CLUSTER;
    const X* x = a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row);
    X* y = a.y + row_offset(row, a.rows, a.M, a.y_outer, a.y_row);
    const A q = scale_for<A>(a.N);

    Segment<32, CHUNK_VECS> s[1];
    for (int i = group; i < own.count; i += GROUPS) {
        const int first = (own.begin + i) * COLS + warp * WARP_COLS;
        const int n = at_most(N - first, WARP_COLS);
        stage_columns(s[0], staged + i * CHUNK_WARPS * WARP_VECS, x + (n ? first : 0), n, lane);
        const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
        if (lane == 0) partials[i * CHUNK_PARTIALS + warp] = sum;
    }
    __syncthreads();
    for (int i = group; i < own.count; i += GROUPS) {
        const int chunk = (own.begin + i) * COLS;
        const int n = at_most(N - chunk - warp * WARP_COLS, WARP_COLS);
        A* partial = partials + i * CHUNK_PARTIALS;
        staged_columns<X>(s[0], staged + i * CHUNK_WARPS * WARP_VECS, n, lane);
        A sum, squares;
        lane_deviations<32, X>(s[0].v, chunk_mean(partial, at_most(N - chunk, COLS)), q, n, lane, sum, squares);
        put_deviations(partial, warp, lane, sum, squares);
    }
    __syncthreads();
    cluster_wait();  // all blocks have started
    const int sent = threadIdx.x / CLUSTER, to = threadIdx.x % CLUSTER;
    if (sent < own.count) {
        const int c = own.begin + sent;
        const Moments<A> m = chunk_moments(partials + sent * CHUNK_PARTIALS, at_most(N - c * COLS, COLS), q);
        send(moments + 3 * c, to, m.hi);
        send(moments + 3 * c + 1, to, m.lo);
        send(moments + 3 * c + 2, to, m.m2q);
    }
    cluster_arrive();
    cluster_wait();
    const RowStats<A> stats[1] = {row_stats(merge_chunks<X>(moments, chunks, N, q, lane), q, a.N, a.eps)};
    if (rank == 0 && threadIdx.x == 0) store_stats(a.mean, a.rstd, row, stats[0]);

    for (int i = group; i < own.count; i += GROUPS) {
        const int first = (own.begin + i) * COLS + warp * WARP_COLS;
        const int n = at_most(N - first, WARP_COLS);
        staged_columns<X>(s[0], staged + i * CHUNK_WARPS * WARP_VECS, n, lane);
        normalize_segments<32, CHUNK_VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(s, stats, a.weight, a.bias, first, n, lane);
        store_columns(s[0], y + (n ? first : 0), n, lane);
    }
}
