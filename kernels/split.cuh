// K5: few rows of huge N, or rows beyond shared memory. The launch order is the only barrier: no
// cooperative launch, no spinning, no atomics. Forward and backward, 256 threads a block.
//
// A section is `chunks_per_section` chunks (one, until a row has more than 512).

// ---- forward: three kernels ----------------------------------------------------------------------------
// The moments of every section of a row, A moments[rows][sections][3] of a workspace; what they come to,
// A stats[rows][4] behind them; y.

template <class X>
__device__ __forceinline__ i64 section_count(i64 N, i64 section, i64 chunks_per_section) {
    const i64 cols = chunks_per_section * Chunk<X>::cols;
    const i64 left = N - section * cols;
    return left < cols ? left : cols;
}

// The moments of one section, by a whole block; with ADD x becomes x + residual first. Shared memory:
// A partial[3][CHUNK_WARPS], which a barrier has to part from what comes next.
template <class Op, bool ADD, bool ALIGNED, class X, class W, class B, class A>
__device__ __forceinline__ Moments<A> section_moments(
    const RowArguments<X, W, B>& a, i64 row, i64 section, i64 chunks_per_section, const Look<Op, X>& look, A p,
    A* partial) {
    typedef ::Op<Op::center, Op::unit_weight, ADD> Loads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 begin = section * chunks_per_section * Chunk<X>::cols;
    const i64 end = begin + section_count<X>(a.N, section, chunks_per_section);
    Moments<A> first = {0, 0, 0};
    Run<A> run = {0, 0, 0};
    for (i64 c = begin; c < end; c += Chunk<X>::cols) {
        const i64 col = c + warp * Chunk<X>::warp_cols;
        const int n = at_most(a.N - col, Chunk<X>::warp_cols);
        const int count = at_most(a.N - c, Chunk<X>::cols);
        LoadedRow<Loads, 32, CHUNK_VECS> loaded;
        load_row<Loads, ALIGNED>(loaded, a, row, col, n, lane);
        take_row<Loads, ALIGNED>(loaded, a, row, col, n, lane);
        // The sums below are written over what chunk_moments has read of the chunk before.
        if (c > begin) __syncthreads();
        if (!look.again()) {
            const A sum = warp_sum<32>(lane_sum<X, A>(loaded.x.v));
            if (lane == 0) partial[warp] = sum;
            __syncthreads();
        }
        put_deviations<Op, ALIGNED>(partial, loaded.x, look, p, count, n, warp, lane);
        __syncthreads();
        const Moments<A> m = chunk_moments(look, partial, count, p);
        if (c == begin) first = m;
        run = merge(run, run_of(m, (A)count, first.hi), p);
    }
    return Moments<A>{first.hi, run.mean, run.m2};
}

template <class A>
__device__ __forceinline__ void put_moments(A* to, const Moments<A>& m) {
    to[0] = m.hi;
    to[1] = m.lo;
    to[2] = m.m2;
}

template <class Op, bool ALIGNED, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ void norm_fwd_split_stats(
    const RowArguments<X, W, B>& a, A* moments, i64 sections, i64 chunks_per_section) {
    DYNAMIC_SHARED(shared);
    const i64 row = blockIdx.x / sections, section = blockIdx.x - row * sections;
    const Moments<A> m = section_moments<Op, Op::residual, ALIGNED>(
        a, row, section, chunks_per_section, Look<Op, X>(), factor_for<A>(a.N), (A*)shared);
    if (threadIdx.x == 0) put_moments(moments + 3 * (i64)blockIdx.x, m);
}

// The moments of a row from those of its sections. Shared memory: Run<A> runs[CHUNK_WARPS].
template <class X, class A>
__device__ __forceinline__ Moments<A> merge_sections(
    const A* moments, i64 N, i64 sections, i64 chunks_per_section, A p, Run<A>* runs) {
    const A shift = moments[0];
    Run<A> run = {0, 0, 0};
    for (i64 i = threadIdx.x; i < sections; i += CHUNK_THREADS) {
        const Moments<A> m = {moments[3 * i], moments[3 * i + 1], moments[3 * i + 2]};
        run = merge(run, run_of(m, (A)section_count<X>(N, i, chunks_per_section), shift), p);
    }
    run = warp_merge(run, p);
    if (threadIdx.x % 32 == 0) runs[threadIdx.x / 32] = run;
    __syncthreads();
    run = runs[0];
#pragma unroll
    for (int w = 1; w < CHUNK_WARPS; ++w) run = merge(run, runs[w], p);
    return Moments<A>{shift, run.mean, run.m2};
}

// What was normalized: x, or where there is a residual the sum, which the first kernel has left.
template <class Op, class X, class W, class B>
__device__ __forceinline__ RowArguments<X, W, B> of_sums(RowArguments<X, W, B> a) {
    if (Op::residual) {
        a.x = a.sum;
        a.x_outer = a.sum_outer;
        a.x_row = a.sum_row;
    }
    return a;
}

// A block merges the sections of a row. A row that has to be looked at again it reads itself, while
// nobody writes. Shared memory: Run<A> runs[CHUNK_WARPS].
template <class Op, bool ALIGNED, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ void norm_fwd_split_merge(
    const RowArguments<X, W, B>& given, A* moments, A* stats, i64 sections, i64 chunks_per_section) {
    DYNAMIC_SHARED(shared);
    const RowArguments<X, W, B> a = of_sums<Op>(given);
    const i64 row = blockIdx.x;
    const A p = factor_for<A>(a.N);
    moments += row * sections * 3;

    Look<Op, X> look;
    A scale;
    Moments<A> m;
    for (;;) {
        m = merge_sections<X>(moments, a.N, sections, chunks_per_section, p, (Run<A>*)shared);
        scale = look.scale;
        if (!look.next(m.hi, m.lo, m.m2, a.N, a.eps)) break;  // of all threads or of none
        for (i64 i = 0; i < sections; ++i) {
            __syncthreads();
            m = section_moments<Op, false, ALIGNED>(a, row, i, chunks_per_section, look, p, (A*)shared);
            if (threadIdx.x == 0) put_moments(moments + 3 * i, m);
        }
        __syncthreads();
    }
    if (threadIdx.x) return;
    const RowStats<A> found = row_stats(m, p, scale, (A)a.N, a.eps);
    store_stats(a.mean, a.rstd, row, found);
    stats += 4 * row;
    stats[0] = found.mean;
    stats[1] = found.rstd;
    stats[2] = found.shift;
    stats[3] = found.scale;
}

template <class Op, bool ALIGNED, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ void norm_fwd_split_normalize(const RowArguments<X, W, B>& given, const A* stats, i64 parts) {
    constexpr int V = PerVec<X>::count;
    typedef ::Op<Op::center, Op::unit_weight, false> Loads;  // what there was to add has been
    const RowArguments<X, W, B> a = of_sums<Op>(given);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Backwards: what the first kernel read last is still in L2.
    const i64 index = (i64)gridDim.x - 1 - blockIdx.x;
    const i64 row = index / parts, part = index - row * parts;
    stats += 4 * row;
    const RowStats<A> of_row[1] = {RowStats<A>{stats[0], stats[1], stats[2], stats[3]}};

    const i64 chunks = (a.N + Chunk<X>::cols - 1) / Chunk<X>::cols;
    const i64 per_part = (chunks + parts - 1) / parts;
    const i64 begin = part * per_part;
    const i64 end = begin + per_part < chunks ? begin + per_part : chunks;
    for (i64 c = end - 1; c >= begin; --c) {
        const i64 col = c * Chunk<X>::cols + warp * Chunk<X>::warp_cols;
        const int n = at_most(a.N - col, Chunk<X>::warp_cols);
        LoadedRow<Loads, 32, CHUNK_VECS> loaded;
        load_row<Loads, ALIGNED>(loaded, a, row, col, n, lane);
        const i64 first = n ? col : 0;
        const Affine<HAS_WEIGHT, false, ALIGNED, 32, CHUNK_VECS, V, W> weight(a.weight + first, n, lane);
        const Affine<HAS_BIAS, false, ALIGNED, 32, CHUNK_VECS, V, B> bias(a.bias + first, n, lane);
        take_row<Loads, ALIGNED>(loaded, a, row, col, n, lane);
        Segment<32, CHUNK_VECS> s[1] = {loaded.x};
        X* const y[1] = {row_at(a.y, a, a.y_outer, a.y_row, row, col, n)};
        const int count[1] = {n};
        normalize_to<Op>(y, count, s, of_row, weight, bias, lane);
    }
}

// ---- backward: three kernels, five passes over memory ---------------------------------------------------
// Rows whose dweight and dbias fit no block: the sums of every section of a row, what each row's sums come
// to, and dx with the sums over rows, by columns. Workspace: A sums[rows][sections][3], then
// A gradients[rows][3].

enum {
    APPLY_VECS = 2,  // per thread of the last kernel, whose sums over rows take V registers each, twice
};

template <class Op, bool ALIGNED, class X, class W, bool HAS_WEIGHT, class A>
__device__ __forceinline__ void norm_bwd_split_sums(
    const GradientArguments<X, W>& a, A* to, i64 sections, i64 chunks_per_section) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 row = blockIdx.x / sections, section = blockIdx.x - row * sections;
    const i64 begin = section * chunks_per_section * Chunk<X>::cols;
    const i64 length = chunks_per_section * Chunk<X>::cols;
    const i64 end = a.N - begin < length ? a.N : begin + length;

    GradientSums<A> mine = {0, 0, 0};
    for (i64 c = begin; c < end; c += Chunk<X>::cols) {
        const i64 col = c + warp * Chunk<X>::warp_cols;
        const int n = at_most(a.N - col, Chunk<X>::warp_cols);
        GradientRow<32, CHUNK_VECS, A> r;
        fetch<Op, ALIGNED>(r, a, row, col, n, lane);
        const Affine<HAS_WEIGHT, false, ALIGNED, 32, CHUNK_VECS, PerVec<X>::count, W> weight(
            a.weight + col, n, lane);
        to_columns<ALIGNED, X>(r, n, lane);
        const GradientSums<A> s = lane_sums<Op, HAS_WEIGHT, ALIGNED, X>(r, weight, n, lane);
        mine.h += s.h;
        mine.g += s.g;
        mine.gh += s.gh;
    }
    const GradientSums<A> s = block_sums<Op, CHUNK_WARPS>((A*)shared, mine, warp, lane);
    if (threadIdx.x == 0) {
        to += 3 * (i64)blockIdx.x;
        to[0] = s.h;
        to[1] = s.g;
        to[2] = s.gh;
    }
}

// One warp per row adds its sections, always in the same tree.
template <class Op, int THREADS, class A>
__device__ __forceinline__ void norm_bwd_split_merge(
    const A* from, A* to, i64 rows, i64 sections, i64 N) {
    const int lane = threadIdx.x % 32;
    const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // the whole warp
    from += row * sections * 3;
    GradientSums<A> s = {0, 0, 0};
    for (i64 i = lane; i < sections; i += 32) {
        s.h += from[3 * i];
        s.g += from[3 * i + 1];
        s.gh += from[3 * i + 2];
    }
    const RowGradient<A> c = row_gradient<Op>(warp_sum<Op, 32>(s), N);
    if (lane == 0) {
        to[3 * row] = c.lack;
        to[3 * row + 1] = c.c1;
        to[3 * row + 2] = c.c2;
    }
}

// A block owns a run of columns and goes through every row of its part.
template <class Op, bool ALIGNED, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT, class A>
__device__ __forceinline__ void norm_bwd_split_apply(
    const GradientArguments<X, W>& a, const A* gradients, i64 parts) {
    constexpr int V = PerVec<X>::count;
    constexpr int COLS = 32 * APPLY_VECS * V;  // columns of one warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 run = blockIdx.x / parts, part = blockIdx.x - run * parts;
    const i64 first = (run * CHUNK_WARPS + warp) * COLS;
    const int n = at_most(a.N - first, COLS);

    RegisterTotals<APPLY_VECS, A, V> totals;
    totals.clear();
    GradientRow<32, APPLY_VECS, A> next;
    fetch<Op, ALIGNED>(next, a, part, first, n, lane);
    const Affine<HAS_WEIGHT, ALIGNED, ALIGNED, 32, APPLY_VECS, V, W> weight(a.weight + first, n, lane);
    for (i64 row = part; row < a.rows; row += parts) {
        GradientRow<32, APPLY_VECS, A> r = next;
        fetch<Op, ALIGNED>(next, a, row + parts, first, n, lane);
        const RowGradient<A> c = {gradients[3 * row], gradients[3 * row + 1], gradients[3 * row + 2]};
        to_columns<ALIGNED, X>(r, n, lane);
        finish_row<Op, DX, DWEIGHT, DBIAS, HAS_WEIGHT, ALIGNED>(r, c, a, weight, row, first, n, lane, totals);
    }
    put_totals<X, DWEIGHT, DBIAS, 32>(a.partials, part, parts, a.N, totals, first, n, lane);
}
