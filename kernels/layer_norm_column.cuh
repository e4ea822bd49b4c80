// K6: arrays whose normalized axis is strided. A block takes R neighbouring rows through a tile in shared
// memory: read along the rows or along the columns, written either way, so that a column-major matrix
// becomes a row-major one in the same pass. Rows that are longer than a panel of the tile are swept
// twice, the second time backwards, as the last panel is still there and the ones before it in L2.
//
// Shared memory: X tile[panel][PITCH], then A red[3][PARTS][R], then A stats[3][R].

template <class X, class W, class B>
struct ColumnArguments {
    typedef typename Accumulator<X>::type A;
    const X* x;
    X* y;
    const W* weight;  // (N,) or null
    const B* bias;    // (N,) or null
    A* mean;          // (rows,) or null
    A* rstd;          // (rows,) or null
    i64 rows;         // outer * M
    i64 M;
    i64 x_outer, x_row, x_col, y_outer, y_row, y_col;  // element strides; of row and col one is 1
    i64 stats_outer, stats_row;                        // of mean and rstd
    i64 N;
    double eps;
};

template <bool HAS_WEIGHT, bool HAS_BIAS, class W, class B, class A>
__device__ __forceinline__ A affine(A x_hat, A w, A b) {
    if (HAS_WEIGHT && HAS_BIAS) return multiply_add(x_hat, w, b);
    return HAS_WEIGHT ? x_hat * w : HAS_BIAS ? x_hat + b : x_hat;
}

// Columns [first, first + cols) of y, whose rows lie next to each other; each thread has its own rows.
template <int THREADS, int R, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A, int PAIR>
__device__ __forceinline__ void store_along_rows(
    const X* tile, const ColumnArguments<X, W, B>& a, X* y, i64 first, int rows, int cols,
    const RowStats<A> (&stats)[PAIR]) {
    typedef Tile<X, R> Shape;
    typedef Word<X, PAIR> Wd;
    constexpr int LANES = R / PAIR, PARTS = THREADS / LANES;
    const int r = threadIdx.x % LANES * PAIR;
    if (r >= rows) return;
    const bool whole = ((u64)y & (sizeof(Wd) - 1)) == 0 && a.y_col % PAIR == 0 && r + PAIR <= rows;
    for (int n = threadIdx.x / LANES; n < cols; n += PARTS) {
        const A w = HAS_WEIGHT ? (A)to_float(a.weight[first + n]) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(a.bias[first + n]) : (A)0;
        A t[PAIR];
        read_word(tile + n * Shape::PITCH + r, t);
        Wd out;
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            t[i] = multiply_add(t[i] - stats[i].mean, stats[i].rstd, stats[i].shift);
            out.e[i] = rounded(affine<HAS_WEIGHT, HAS_BIAS, W, B>(t[i], w, b), (const X*)0);
        }
        X* to = y + n * a.y_col + r;
        if (whole) {
            *(Wd*)to = out;
        } else {
#pragma unroll
            for (int i = 0; i < PAIR; ++i)
                if (r + i < rows) to[i] = out.e[i];
        }
    }
}

// The same of a y whose columns lie next to each other; the statistics of all rows in A stats[3][R].
template <int THREADS, int R, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ void store_along_columns(
    const X* tile, const ColumnArguments<X, W, B>& a, X* y, i64 first, int rows, int cols, const A* stats) {
    typedef Tile<X, R> Shape;
    const int span = span_of(cols), lane = threadIdx.x % 32;
    for (int n = lane % span; n < cols; n += span) {
        const A w = HAS_WEIGHT ? (A)to_float(a.weight[first + n]) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(a.bias[first + n]) : (A)0;
        for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
            const int r = row_of_turn(i, lane, span);
            if (r >= rows) continue;
            const A x = (A)to_float(tile[n * Shape::PITCH + r]);
            const A x_hat = multiply_add(x - stats[r], stats[R + r], stats[2 * R + r]);
            y[r * a.y_row + n] = rounded(affine<HAS_WEIGHT, HAS_BIAS, W, B>(x_hat, w, b), (const X*)0);
        }
    }
}

template <int THREADS, int R, bool IN_ROWS, bool OUT_ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_column(const ColumnArguments<X, W, B>& a, i64 panel) {
    typedef typename Accumulator<X>::type A;
    typedef Tile<X, R> Shape;
    constexpr int PAIR = Shape::PAIR, LANES = R / PAIR, PARTS = THREADS / LANES;
    DYNAMIC_SHARED(shared);
    X* tile = (X*)shared;
    const i64 tile_bytes = (panel * Shape::PITCH * (i64)sizeof(X) + 15) / 16 * 16;
    A* red = (A*)(shared + tile_bytes);
    A* stats = red + 3 * PARTS * R;
    const i64 groups = (a.M + R - 1) / R;
    const i64 outer = blockIdx.x / groups, m = (blockIdx.x - outer * groups) * R;
    const int rows = at_most(a.M - m, R);
    const X* x = a.x + outer * a.x_outer + m * a.x_row;
    X* y = a.y + outer * a.y_outer + m * a.y_row;
    const A q = scale_for<A>(a.N);
    const i64 panels = (a.N + panel - 1) / panel;
    const int r = threadIdx.x % LANES * PAIR;

    TileRuns<PAIR, A> runs;
    for (i64 p = 0; p < panels; ++p) {
        const i64 first = p * panel;
        const int cols = at_most(a.N - first, (int)panel);
        if (p) __syncthreads();  // before the tile of the panel before is overwritten
        if (IN_ROWS)
            load_along_rows<THREADS, R>(tile, x + first * a.x_col, a.x_col, rows, cols);
        else
            load_along_columns<THREADS, R>(tile, x + first, a.x_row, rows, cols);
        staged();
        __syncthreads();
        add_panel<THREADS, R>(tile, rows, cols, p == 0, q, red, runs);
    }
    RowStats<A> mine[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        const Moments<A> moments = {runs.shift[i], runs.run[i].mean, runs.run[i].m2q};
        mine[i] = row_stats(moments, q, a.N, a.eps);
    }
    if (threadIdx.x < LANES) {
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            if (!OUT_ROWS) {
                stats[r + i] = mine[i].mean;
                stats[R + r + i] = mine[i].rstd;
                stats[2 * R + r + i] = mine[i].shift;
            }
            if (r + i < rows) store_stats(a.mean, a.rstd, outer * a.stats_outer + (m + r + i) * a.stats_row, mine[i]);
        }
    }
    for (i64 p = panels - 1; p >= 0; --p) {
        const i64 first = p * panel;
        const int cols = at_most(a.N - first, (int)panel);
        if (p < panels - 1) {
            __syncthreads();
            if (IN_ROWS)
                load_along_rows<THREADS, R>(tile, x + first * a.x_col, a.x_col, rows, cols);
            else
                load_along_columns<THREADS, R>(tile, x + first, a.x_row, rows, cols);
            staged();
        }
        __syncthreads();
        if (OUT_ROWS)
            store_along_rows<THREADS, R, X, W, B, HAS_WEIGHT, HAS_BIAS>(tile, a, y + first * a.y_col, first, rows, cols, mine);
        else
            store_along_columns<THREADS, R, X, W, B, HAS_WEIGHT, HAS_BIAS>(tile, a, y + first, first, rows, cols, stats);
    }
}
