// K5 backward: rows whose dweight and dbias fit no block. Three kernels, five passes over memory: the
// sums of every section of a row, what each row's sums come to, and dx with the sums over rows, by
// columns. The launch order is the only barrier.
//
// A section is `chunks_per_section` chunks of 16 KiB. Workspace: A sums[rows][sections][3], then
// A gradients[rows][3].

enum {
    APPLY_VECS = 2,  // per thread of the last kernel, whose sums over rows take V registers each, twice
};

template <class X, class W, bool HAS_WEIGHT, class A>
__device__ __forceinline__ void layer_norm_bwd_split_sums(
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
        fetch(r, a, row, col, n, lane);
        to_columns<X>(r, lane);
        const GradientSums<A> s = lane_sums<X, HAS_WEIGHT>(r, a.weight, col, n, lane);
        mine.h += s.h;
        mine.g += s.g;
        mine.gh += s.gh;
    }
    const GradientSums<A> s = block_sums<CHUNK_WARPS>((A*)shared, mine, warp, lane);
    if (threadIdx.x == 0) {
        to += 3 * (i64)blockIdx.x;
        to[0] = s.h;
        to[1] = s.g;
        to[2] = s.gh;
    }
}

// One warp per row adds its sections, always in the same tree.
template <int THREADS, class A>
__device__ __forceinline__ void layer_norm_bwd_split_merge(
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
    const RowGradient<A> c = row_gradient(warp_sum<32>(s), N);
    if (lane == 0) {
        to[3 * row] = c.lack;
        to[3 * row + 1] = c.c1;
        to[3 * row + 2] = c.c2;
    }
}

// A block owns a run of columns and goes through every row of its part.
template <bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT, class A>
__device__ __forceinline__ void layer_norm_bwd_split_apply(
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
    fetch(next, a, part, first, n, lane);
    for (i64 row = part; row < a.rows; row += parts) {
        GradientRow<32, APPLY_VECS, A> r = next;
        fetch(next, a, row + parts, first, n, lane);
        const RowGradient<A> c = {gradients[3 * row], gradients[3 * row + 1], gradients[3 * row + 2]};
        to_columns<X>(r, lane);
        differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r, c, a.weight, first, n, lane, totals);
        store_dx<DX>(r, a, row, first, n, lane);
    }
    put_totals<X, DWEIGHT, DBIAS, 32>(a.partials, part, parts, a.N, totals, first, n, lane);
}
