// K4 backward, on sm_90 and newer: rows beyond K3's, 2, 4 or 8 blocks per row, three passes over memory.
//
// Each block holds a run of the row's chunks of x and dy in registers, and dweight and dbias of its own
// columns in shared memory, which shrink with the size of the cluster. The sums of every chunk go to all
// blocks of the cluster and are added in the tree of K5, so that dx has the bits that K5 gives it.
// Clusters go round the rows as blocks do in K3.
//
// Shared memory: SharedTotals, then A sums[SLOTS][3][CHUNK_WARPS] of this block's chunks, then
// A all[2][chunks][3]: peers send the next row's while this row's are read.

// Adds the warps' sums of every chunk of this block, and sends them to all blocks. By one warp: eight
// lanes have one chunk, and each of them the block that it sends to.
template <int CLUSTER, class A>
__device__ __forceinline__ void send_sums(const A* sums, A* all, const ChunkRun& own, int lane) {
    const int slot = lane / CHUNK_WARPS, to = lane % CHUNK_WARPS;
    GradientSums<A> s = {0, 0, 0};
    if (slot < own.count) {
        const A* from = sums + slot * 3 * CHUNK_WARPS + lane % CHUNK_WARPS;
        s = GradientSums<A>{from[0], from[CHUNK_WARPS], from[2 * CHUNK_WARPS]};
    }
    s = warp_sum<CHUNK_WARPS>(s);
    if (slot >= own.count || to >= CLUSTER) return;
    A* there = all + 3 * (own.begin + slot);
    send(there, to, s.h);
    send(there + 1, to, s.g);
    send(there + 2, to, s.gh);
}

template <int CLUSTER, int THREADS, int CHUNKS, bool AHEAD, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_cluster(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int GROUPS = THREADS / CHUNK_THREADS, SLOTS = GROUPS * CHUNKS;
    constexpr int COLS = Chunk<X>::cols, WARP_COLS = Chunk<X>::warp_cols;
    typedef SharedTotals<THREADS, A, V> Totals;
    typedef GradientRow<32, CHUNK_VECS, A> Part;
    static_assert(SLOTS * CHUNK_WARPS <= 32 && SLOTS * CLUSTER <= 32, "one warp sends and merges");
    DYNAMIC_SHARED(shared);
    const int rank = cluster_rank();
    cluster_arrive();  // this block has started
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    const int chunks = (int)((a.N + COLS - 1) / COLS);
    const ChunkRun own = chunks_of_block<CLUSTER>(chunks, rank);
    const i64 cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    int first[CHUNKS], n[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
        const int slot = j * GROUPS + group;
        first[j] = (own.begin + slot) * COLS + warp * WARP_COLS;
        n[j] = slot < own.count ? at_most(a.N - first[j], WARP_COLS) : 0;
    }
    Totals totals = {shared + 16 * threadIdx.x, DWEIGHT ? CHUNKS * CHUNK_VECS * Totals::PER_VEC : 0};
    A* sums = (A*)(shared + ((int)DWEIGHT + (int)DBIAS) * CHUNKS * CHUNK_VECS * Totals::PER_VEC);
    A* all = sums + SLOTS * 3 * CHUNK_WARPS;
    totals.template clear<CHUNKS * CHUNK_VECS, DWEIGHT, DBIAS>();

    Part next[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
        if (AHEAD) fetch(next[j], a, cluster, first[j], n[j], lane);
    cluster_wait();  // all blocks have started
    int half = 0;
    for (i64 row = cluster; row < a.rows; row += clusters) {
        Part r[CHUNKS];
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            if (AHEAD) {
                r[j] = next[j];
                fetch(next[j], a, row + clusters, first[j], n[j], lane);
            } else {
                fetch(r[j], a, row, first[j], n[j], lane);
            }
        }
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            to_columns<X>(r[j], lane);
            const GradientSums<A> s = warp_sum<32>(lane_sums<X, HAS_WEIGHT>(r[j], a.weight, first[j], n[j], lane));
            put_sums<CHUNK_WARPS>(sums + (j * GROUPS + group) * 3 * CHUNK_WARPS, s, warp, lane);
        }
        __syncthreads();
        if (threadIdx.x < 32) send_sums<CLUSTER>(sums, all + half, own, lane);
        cluster_arrive();
        cluster_wait();
        GradientSums<A> s = {0, 0, 0};
        if (lane < chunks) {
            const A* from = all + half + 3 * lane;
            s = GradientSums<A>{from[0], from[1], from[2]};
        }
        half = 3 * chunks - half;
        const RowGradient<A> c = row_gradient(warp_sum<32>(s), a.N);
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            Totals mine = totals.from(j * CHUNK_VECS);
            differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r[j], c, a.weight, first[j], n[j], lane, mine);
            store_dx<DX>(r[j], a, row, first[j], n[j], lane);
        }
    }
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
        totals.from(j * CHUNK_VECS)
            .template leave<X, CHUNK_VECS, DWEIGHT, DBIAS>(a.partials, cluster, clusters, a.N, first[j], n[j], lane);
}
