// K3 and K4: rows beyond 32 KiB in shared memory, of one block or of a cluster of 2, 4 or 8 (sm_90 and
// newer). Forward and backward.

// ---- forward -----------------------------------------------------------------------------------------
// Each block stages a run of the row's chunks (K3: all), a chunk at a time: the sums of a chunk begin when
// it has arrived, while the chunks after it are on their way. The blocks of a cluster send the moments of
// their chunks to each other, and all merge them in the tree of K5, so that a row has the same bits in all
// three. With several blocks on a multiprocessor one stores while others load.
//
// With a residual the row comes through registers, and lies in columns.
//
// Shared memory, for the most chunks that a block holds: Vec staged[most * CHUNK_THREADS * CHUNK_VECS + 1]
// (K3: ceil(N / V) + 1), u64 arrived[most], A partial[most][CHUNK_PARTIALS]; K4 then A moments[chunks][3].

// The moments of all chunks of a row, merged as K5 merges its sections: 32 at a time, then those.
template <class X, class A, class Of>
__device__ __forceinline__ Moments<A> merge_chunks(const Of& moments_of, int chunks, int N, A p, int lane) {
    const A shift = moments_of(0).hi;
    Run<A> run = {0, 0, 0};
    for (int c = lane; c - lane < chunks; c += 32) {
        Run<A> mine = {0, 0, 0};
        if (c < chunks) mine = run_of(moments_of(c), (A)at_most(N - c * Chunk<X>::cols, Chunk<X>::cols), shift);
        run = merge(run, warp_merge(mine, p), p);
    }
    return Moments<A>{shift, run.mean, run.m2};
}

// x + residual, rounded, to shared memory and to `sum`: this block's columns [begin, begin + n).
template <class Op, bool ALIGNED, int GROUPS, class X, class W, class B>
__device__ __forceinline__ void bring_sums(
    StagedRow<X>& staged, const RowArguments<X, W, B>& a, i64 row, int begin, int n, int chunks, int group, int warp,
    int lane) {
    constexpr int V = PerVec<X>::count;
    for (int c = group; c < chunks; c += GROUPS) {
        const WarpPart<X> part(n, c, warp);
        LoadedRow<Op, 32, CHUNK_VECS> loaded;
        load_row<Op, ALIGNED>(loaded, a, row, begin + part.first, part.n, lane);
        take_row<Op, ALIGNED>(loaded, a, row, begin + part.first, part.n, lane);
#pragma unroll
        for (int k = 0; k < CHUNK_VECS; ++k)
            if ((k * 32 + lane) * V < part.n) staged.at[part.first / V + k * 32 + lane] = loaded.x.v[k];
    }
    staged.skew = 0;
}

template <class Op, bool ALIGNED, int CLUSTER, int THREADS, int STAGING, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_shared(const RowArguments<X, W, B>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int GROUPS = THREADS / CHUNK_THREADS, COLS = Chunk<X>::cols, V = PerVec<X>::count;
    constexpr bool HELD =
        ALIGNED && sizeof(X) < 8 && holds_affine<X, W, B, HAS_WEIGHT, HAS_BIAS, CHUNK_VECS>(32);
    DYNAMIC_SHARED(shared);
    int rank = 0;
    if constexpr (CLUSTER > 1) {
        rank = cluster_rank();
        cluster_arrive();  // this block has started
    }
    const int N = (int)a.N;
    const int chunks = (N + COLS - 1) / COLS, most = (chunks + CLUSTER - 1) / CLUSTER;
    const ChunkRun own = chunks_of_block<CLUSTER>(chunks, rank);
    const int begin = own.begin * COLS, n_own = at_most(N - begin, own.count * COLS);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % CHUNK_WARPS;
    const int group = threadIdx.x / CHUNK_THREADS;
    const i64 row = blockIdx.x / CLUSTER;
    const A p = factor_for<A>(a.N);
    StagedRow<X> staged(
        (Vec*)shared, a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row) + begin, n_own);
    u64* arrived = (u64*)(staged.at + (CLUSTER > 1 ? most * CHUNK_THREADS * CHUNK_VECS : staged.vecs) + 1);
    A* partials = (A*)(arrived + most);
    A* moments = partials + most * CHUNK_PARTIALS;
    if constexpr (Op::residual)
        bring_sums<Op, ALIGNED, GROUPS>(staged, a, row, begin, n_own, own.count, group, warp, lane);
    else
        start_row<ALIGNED, STAGING, THREADS>(staged, arrived, own.count);

    Segment<32, CHUNK_VECS> s[1];
    Look<Op, X> look;
    Moments<A> m;
    A scale;
    for (;;) {
        if (!look.again()) {
            for (int i = group; i < own.count; i += GROUPS) {
                if constexpr (!Op::residual) wait_for_chunk(staged, arrived, i);
                take_part<ALIGNED>(s[0], staged, WarpPart<X>(n_own, i, warp), lane);
                const A sum = warp_sum<32>(lane_sum<X, A>(s[0].v));
                if (lane == 0) partials[i * CHUNK_PARTIALS + warp] = sum;
            }
            __syncthreads();
        }
        for (int i = group; i < own.count; i += GROUPS) {
            if constexpr (!Op::center && !Op::residual) wait_for_chunk(staged, arrived, i);
            const WarpPart<X> part(n_own, i, warp);
            take_part<ALIGNED>(s[0], staged, part, lane);
            put_deviations<Op, ALIGNED>(
                partials + i * CHUNK_PARTIALS, s[0], look, p, at_most(n_own - i * COLS, COLS), part.n, warp, lane);
        }
        __syncthreads();
        const auto of_chunk = [&](int c) {
            return chunk_moments(look, partials + (c - own.begin) * CHUNK_PARTIALS, at_most(N - c * COLS, COLS), p);
        };
        if constexpr (CLUSTER == 1) {
            m = merge_chunks<X>(of_chunk, chunks, N, p, lane);
        } else {
            if (!look.turn) cluster_wait();  // all blocks have started
            const int sent = threadIdx.x / CLUSTER, to = threadIdx.x % CLUSTER;
            if (sent < own.count) {
                A* here = moments + 3 * (own.begin + sent);
                m = of_chunk(own.begin + sent);
                send(here, to, m.hi);
                send(here + 1, to, m.lo);
                send(here + 2, to, m.m2);
            }
            cluster_arrive();
            cluster_wait();
            const auto received = [&](int c) { return Moments<A>{moments[3 * c], moments[3 * c + 1], moments[3 * c + 2]}; };
            m = merge_chunks<X>(received, chunks, N, p, lane);
        }
        scale = look.scale;
        if (!look.next(m.hi, m.lo, m.m2, a.N, a.eps)) break;  // of all blocks or of none
        if constexpr (CLUSTER > 1) {  // all have read what is sent anew
            cluster_arrive();
            cluster_wait();
        } else {
            __syncthreads();
        }
    }
    const RowStats<A> stats[1] = {row_stats(m, p, scale, (A)N, a.eps)};
    if (rank == 0 && threadIdx.x == 0) store_stats(a.mean, a.rstd, row, stats[0]);

    for (int i = group; i < own.count; i += GROUPS) {
        const WarpPart<X> part(n_own, i, warp);
        take_part<ALIGNED>(s[0], staged, part, lane);
        const int first = begin + (part.n ? part.first : 0);
        const Affine<HAS_WEIGHT, HELD, ALIGNED, 32, CHUNK_VECS, V, W> weight(a.weight + first, part.n, lane);
        const Affine<HAS_BIAS, HELD, ALIGNED, 32, CHUNK_VECS, V, B> bias(a.bias + first, part.n, lane);
        X* const y[1] = {row_at(a.y, a, a.y_outer, a.y_row, row, first, part.n)};
        const int count[1] = {part.n};
        normalize_to<Op>(y, count, s, stats, weight, bias, lane);
    }
}

// ---- backward ----------------------------------------------------------------------------------------
// Rows beyond K2's. As there, but the sums over rows lie in shared memory, and a row has one block (K3)
// or a cluster, of which each block has a run of the row's chunks (K4). Then the sums of every chunk go to
// all blocks and are added in the tree of K5, so that dx has the bits that K5 gives it.
//
// Where x and dy fit beside the sums, the next row is copied there while a row is worked on, and costs no
// registers. Elsewhere it is fetched into registers if they hold it (AHEAD), or when it is its turn.
//
// Shared memory: SharedTotals; of K3 A sums[2][3][WARPS]; of K4 A sums[SLOTS][3][CHUNK_WARPS] of this
// block's chunks and A all[2][3][32] of the row's; with copies then Vec x[vecs + 1], dy[vecs + 1], stats,
// u64 arrival.

// The row that comes next, of which a thread holds VECS vectors in each of PARTS parts.
template <class Op, bool ALIGNED, int STAGING, bool AHEAD, int THREADS, int PARTS, int VECS, class X>
struct NextGradient {
    typedef typename Accumulator<X>::type A;
    StagedRow<X> x, dy;
    int begin, count;  // this block's columns
    Vec* stats;        // mean and rstd
    u64* arrival;
    u32 phase;
    // What a few threads bring through registers: x's ends in the second warp, dy's in the third, the
    // statistics in the fourth. It is loaded when the copies start, and put in its place later.
    Vec carried;

    __device__ __forceinline__ NextGradient(void* at, int begin, int count)
        : x((Vec*)at, (const X*)0, count), dy(x.at + x.vecs + 1, (const X*)0, count), begin(begin), count(count), phase(0) {
        stats = dy.at + x.vecs + 1;
        arrival = (u64*)(stats + 1);
        if (threadIdx.x == 0) arrival_init(arrival, arrivals<STAGING, THREADS>());
        __syncthreads();
    }

    template <class W>
    __device__ __forceinline__ void start(
        const GradientArguments<X, W>& a, i64 row, const int (&)[PARTS], const int (&)[PARTS], int) {
        if (row >= a.rows) return;
        x = StagedRow<X>(x.at, a.x + row_offset(row, a.rows, a.M, a.x_outer, a.x_row) + begin, count);
        dy = StagedRow<X>(dy.at, a.dy + row_offset(row, a.rows, a.M, a.dy_outer, a.dy_row) + begin, count);
        const int x_granules = x.granules_of(0, x.vecs), dy_granules = dy.granules_of(0, dy.vecs);
        if (STAGING == STAGE_BULK && threadIdx.x == 0) {
            fence_bulk();
            arrive_expecting(arrival, 16 * (x_granules + dy_granules));
        }
        x.template copy<STAGING, THREADS>(0, x_granules, arrival);
        dy.template copy<STAGING, THREADS>(0, dy_granules, arrival);
        if (STAGING == STAGE_ASYNC) arrive_with_copies(arrival);
        if (!ALIGNED && threadIdx.x / 2 == 16) carried = x.load_edge(threadIdx.x % 2);
        if (!ALIGNED && threadIdx.x / 2 == 32) carried = dy.load_edge(threadIdx.x % 2);
        if (threadIdx.x == 96) {
            const A t[16 / sizeof(A)] = {Op::center ? a.mean[row] : (A)0, a.rstd[row]};
            pack(carried, t, (const A*)0);
        }
    }

    // To be called between `start` and a barrier that comes before the row is taken.
    __device__ __forceinline__ void put_carried() const {
        if (!ALIGNED && threadIdx.x / 2 == 16) x.put_edge(threadIdx.x % 2, carried);
        if (!ALIGNED && threadIdx.x / 2 == 32) dy.put_edge(threadIdx.x % 2, carried);
        if (threadIdx.x == 96) store_shared16(stats, carried);
    }

    template <class W>
    __device__ __forceinline__ void take(
        GradientRow<32, VECS, A> (&r)[PARTS], const GradientArguments<X, W>&, i64, const int (&)[PARTS],
        const int (&)[PARTS], int lane) {
        wait_for(arrival, phase);
        phase ^= 1;
        A t[16 / sizeof(A)];
        unpack(load_shared16(stats), t, (const A*)0);
#pragma unroll
        for (int j = 0; j < PARTS; ++j) {
            const int mine = (j * THREADS / 32 + threadIdx.x / 32) * 32 * VECS + lane;
#pragma unroll
            for (int k = 0; k < VECS; ++k) {
                r[j].x.v[k] = x.template columns<ALIGNED>(mine + k * 32);
                r[j].dy.v[k] = dy.template columns<ALIGNED>(mine + k * 32);
            }
            r[j].mean = t[0];
            r[j].rstd = t[1];
        }
        __syncthreads();  // before the next copies
    }
    __device__ __forceinline__ void settle(GradientRow<32, VECS, A>&, int, int) const {}
};

// The same in registers, or fetched when it is its turn.
template <class Op, bool ALIGNED, bool AHEAD, int THREADS, int PARTS, int VECS, class X>
struct NextGradient<Op, ALIGNED, STAGE_REGISTERS, AHEAD, THREADS, PARTS, VECS, X> {
    typedef typename Accumulator<X>::type A;
    typedef GradientRow<32, VECS, A> Part;
    Part next[PARTS];

    __device__ __forceinline__ NextGradient(void*, int, int) {}
    template <class W>
    static __device__ __forceinline__ void bring(
        Part (&r)[PARTS], const GradientArguments<X, W>& a, i64 row, const int (&first)[PARTS], const int (&n)[PARTS],
        int lane) {
#pragma unroll
        for (int j = 0; j < PARTS; ++j) fetch<Op, ALIGNED>(r[j], a, row, first[j], n[j], lane);
    }
    template <class W>
    __device__ __forceinline__ void start(
        const GradientArguments<X, W>& a, i64 row, const int (&first)[PARTS], const int (&n)[PARTS], int lane) {
        if (AHEAD) bring(next, a, row, first, n, lane);
    }
    __device__ __forceinline__ void put_carried() const {}
    template <class W>
    __device__ __forceinline__ void take(
        Part (&r)[PARTS], const GradientArguments<X, W>& a, i64 row, const int (&first)[PARTS], const int (&n)[PARTS],
        int lane) {
        if (!AHEAD) bring(next, a, row, first, n, lane);
#pragma unroll
        for (int j = 0; j < PARTS; ++j) r[j] = next[j];
    }
    __device__ __forceinline__ void settle(Part& r, int n, int lane) const { to_columns<ALIGNED, X>(r, n, lane); }
};

// Adds the warps' sums of every chunk of this block, and sends them to all blocks. By one warp: eight
// lanes have one chunk, and each of them the block that it sends to.
template <class Op, int CLUSTER, class A>
__device__ __forceinline__ void send_sums(const A* sums, A* all, const ChunkRun& own, int lane) {
    const int slot = lane / CHUNK_WARPS, to = lane % CHUNK_WARPS;
    const bool sends = slot < own.count && to < CLUSTER;
    const GradientSums<A> s = sums_of_warps<Op, CHUNK_WARPS>(sums + (slot < own.count ? slot : 0) * 3 * CHUNK_WARPS, lane);
    if (!sends) return;
    A* there = all + own.begin + slot;
    send(there, to, s.h);
    send(there + 32, to, s.g);
    send(there + 64, to, s.gh);
}

// A thread holds HELD vectors of x and of dy.
template <class Op, bool ALIGNED, int CLUSTER, int THREADS, int HELD, int STAGING, bool AHEAD, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void norm_bwd_shared(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    // A slot is the row (K3) or one of its chunks, held by so many warps; each has a run of neighbouring
    // columns, and its part in every slot of its own.
    constexpr int WARPS = CLUSTER > 1 ? (int)CHUNK_WARPS : THREADS / 32, VECS = CLUSTER > 1 ? (int)CHUNK_VECS : HELD;
    constexpr int GROUPS = THREADS / 32 / WARPS, PARTS = HELD / VECS, SLOTS = PARTS * GROUPS;
    constexpr int WARP_COLS = 32 * VECS * V, COLS = WARPS * WARP_COLS;
    typedef SharedTotals<THREADS, A, V> Totals;
    typedef Affine<HAS_WEIGHT, false, ALIGNED, 32, VECS, V, W> Weight;
    static_assert(SLOTS * WARPS <= 32 && SLOTS * CLUSTER <= 32, "one warp sends and merges");
    DYNAMIC_SHARED(shared);
    ChunkRun own = {0, 1};
    int chunks = 1;
    if constexpr (CLUSTER > 1) {
        cluster_arrive();  // this block has started
        chunks = (int)((a.N + COLS - 1) / COLS);
        own = chunks_of_block<CLUSTER>(chunks, cluster_rank());
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / 32 / WARPS;
    const i64 begin = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    int first[PARTS], n[PARTS];
#pragma unroll
    for (int j = 0; j < PARTS; ++j) {
        const int slot = j * GROUPS + group;
        first[j] = (own.begin + slot) * COLS + warp * WARP_COLS;
        n[j] = slot < own.count ? at_most(a.N - first[j], WARP_COLS) : 0;
    }
    Totals totals = {shared + 16 * threadIdx.x, DWEIGHT ? HELD * Totals::PER_VEC : 0};
    A* sums = (A*)(shared + ((int)DWEIGHT + (int)DBIAS) * HELD * Totals::PER_VEC);
    A* all = sums + SLOTS * 3 * WARPS;
    totals.template clear<HELD, DWEIGHT, DBIAS>();

    NextGradient<Op, ALIGNED, STAGING, AHEAD, THREADS, PARTS, VECS, X> next(
        all + (CLUSTER > 1 ? 2 * 3 * 32 : 3 * WARPS), own.begin * COLS,
        CLUSTER > 1 ? at_most(a.N - own.begin * COLS, own.count * COLS) : (int)a.N);
    next.start(a, begin, first, n, lane);
    next.put_carried();
    if (STAGING != STAGE_REGISTERS) __syncthreads();
    if constexpr (CLUSTER > 1) cluster_wait();  // all blocks have started
    // Of K3 the warps' sums, of K4 the chunks': the next row's are written while this row's are read.
    int half = 0;
    for (i64 row = begin; row < a.rows; row += step) {
        GradientRow<32, VECS, A> r[PARTS];
        next.take(r, a, row, first, n, lane);
        next.start(a, row + step, first, n, lane);
#pragma unroll
        for (int j = 0; j < PARTS; ++j) {
            next.settle(r[j], n[j], lane);
            const Weight weight(a.weight + first[j], n[j], lane);
            const GradientSums<A> s =
                warp_sum<Op, 32>(lane_sums<Op, HAS_WEIGHT, ALIGNED, X>(r[j], weight, n[j], lane));
            put_sums<WARPS>(sums + (CLUSTER > 1 ? (j * GROUPS + group) * 3 * WARPS : half), s, warp, lane);
        }
        if (row + step < a.rows) next.put_carried();
        __syncthreads();
        GradientSums<A> s = {0, 0, 0};
        if constexpr (CLUSTER > 1) {
            if (threadIdx.x < 32) send_sums<Op, CLUSTER>(sums, all + half, own, lane);
            cluster_arrive();
            cluster_wait();
            const A* from = all + half + lane;
            if (lane < chunks) s = GradientSums<A>{from[0], from[32], from[64]};
            s = warp_sum<Op, 32>(s);
            half = 3 * 32 - half;
        } else {
            s = sums_of_warps<Op, WARPS>(sums + half, lane);
            half = 3 * WARPS - half;
        }
        const RowGradient<A> c = row_gradient<Op>(s, a.N);
#pragma unroll
        for (int j = 0; j < PARTS; ++j) {
            Totals mine = totals.from(j * VECS);
            const Weight weight(a.weight + first[j], n[j], lane);
            finish_row<Op, DX, DWEIGHT, DBIAS, HAS_WEIGHT, ALIGNED>(
                r[j], c, a, weight, row, first[j], n[j], lane, mine);
        }
    }
#pragma unroll
    for (int j = 0; j < PARTS; ++j)
        totals.from(j * VECS)
            .template leave<X, VECS, DWEIGHT, DBIAS>(a.partials, begin, step, a.N, first[j], n[j], lane);
}
