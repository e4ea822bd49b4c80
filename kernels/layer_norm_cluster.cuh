// K4: long rows on sm_90 and newer, 2, 4 or 8 blocks per row.
//
// Each block stages a run of the row's chunks in its shared memory, as K3 does a whole row: several
// blocks fit on a multiprocessor, and one stores while others load. Each sends the moments of its chunks
// to all blocks of the cluster, and all merge them in the tree of K5, so that a row has the bits that
// K3 and K5 give it.
//
// Shared memory, for the most chunks that a block holds: Vec staged[most * CHUNK_THREADS * CHUNK_VECS + 1],
// u64 arrived[most], A partial[most][CHUNK_PARTIALS]; then A moments[chunks][3].

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
    constexpr int GROUPS = THREADS / CHUNK_THREADS, COLS = Chunk<X>::cols;
    DYNAMIC_SHARED(shared);
    const int rank = cluster_rank();
    cluster_arrive();  // this block has started
    const int N = (int)a.N;
    const int chunks = (N + COLS - 1) / COLS, most = (chunks + CLUSTER - 1) / CLUSTER;
    const ChunkRun own = chunks_of_block<CLUSTER>(chunks, rank);
    const int begin = own.begin * COLS, n_own = at_most(N - begin, own.count * COLS);
    u64* arrived = (u64*)((Vec*)shared + most * CHUNK_THREADS * CHUNK_VECS + 1);
    A* partials = (A*)(arrived + most);
    A* moments = partials + most * CHUNK_PARTIALS;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    const i64 row = blockIdx.x / CLUSTER;
    const X* x = a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row);
    X* y = a.y + row_offset(row, a.rows, a.M, a.y_outer, a.y_row);
    const A q = scale_for<A>(a.N);
    const StagedRow<X> staged((Vec*)shared, x + begin, n_own);
    start_row<STAGE_BULK, THREADS>(staged, arrived, own.count);

    Segment<32, CHUNK_VECS> s[1];
    for (int i = group; i < own.count; i += GROUPS) {
        wait_for_chunk(staged, arrived, i);
        take_part(s[0], staged, WarpPart<X>(n_own, i, warp), lane);
        const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
        if (lane == 0) partials[i * CHUNK_PARTIALS + warp] = sum;
    }
    __syncthreads();
    for (int i = group; i < own.count; i += GROUPS) {
        const WarpPart<X> part(n_own, i, warp);
        A* partial = partials + i * CHUNK_PARTIALS;
        take_part(s[0], staged, part, lane);
        A sum, squares;
        lane_deviations<32, X>(
            s[0].v, chunk_mean(partial, at_most(n_own - i * COLS, COLS)), q, part.n, lane, sum, squares);
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
        const WarpPart<X> part(n_own, i, warp);
        take_part(s[0], staged, part, lane);
        normalize_segments<32, CHUNK_VECS, X, W, B, HAS_WEIGHT, HAS_BIAS>(
            s, stats, a.weight, a.bias, begin + part.first, part.n, lane);
        store_columns(s[0], y + (part.n ? begin + part.first : 0), part.n, lane);
    }
}
