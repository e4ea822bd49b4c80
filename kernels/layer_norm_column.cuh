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
    runs.clear();
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
        add_panel<THREADS, R, false>(tile, rows, cols, q, red, runs);
    }
    RowStats<A> mine[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) mine[i] = tile_stats(runs.run[i], runs.shift[i], q, a.eps);
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
            store_along_rows<THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, y + first * a.y_col, a.y_col, a.weight, a.bias, first, rows, cols, mine);
        else
            store_along_columns<THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, y + first * a.y_col, a.y_row, a.y_col, a.weight, a.bias, first, rows, cols, stats);
    }
}
