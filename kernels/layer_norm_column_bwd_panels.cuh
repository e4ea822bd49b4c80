// K6 backward of rows that are longer than a pair of tiles: a tile of rows is swept twice by panels of
// PANEL columns, first for the sums of its rows, then backwards for dx and the sums over rows, as the
// last panel is still there and the ones before it are the likeliest to be in L2. x and dy are read
// twice, but for the last panel, and dx is written once. The sums of a row are those of one tile: a panel
// has a whole number of classes' rounds.
//
// A block's sums over rows go to its own partials after every panel: nobody else writes there, and a
// tile reads and writes them once for its R rows. Shared memory as in layer_norm_column_bwd.cuh, with
// PANEL columns in place of N.

// Adds what the threads of a block hold of `cols` columns to the block's partials at `to`; the first
// tile finds nothing there.
template <int THREADS, class A>
__device__ __forceinline__ void add_partials(A* to, const A* totals, int cols, bool first_tile) {
    for (int n = threadIdx.x; n < cols; n += THREADS) {
        const A total = column_total<THREADS>(totals, n, cols);
        to[n] = first_tile ? total : to[n] + total;
    }
}

template <int THREADS, int R, int PANEL, bool X_ROWS, bool DY_ROWS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_column_panels(const ColumnGradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    typedef Tile<X, R> Shape;
    typedef TileShare<THREADS, R, X> Share;
    static_assert(PANEL % TILE_CLASSES == 0, "or a panel would begin with another class");
    constexpr int TILE_BYTES = (PANEL * Shape::PITCH * (int)sizeof(X) + 15) / 16 * 16;
    DYNAMIC_SHARED(shared);
    X* x = (X*)shared;
    X* dy = (X*)(shared + TILE_BYTES);
    A* red = (A*)(shared + 2 * TILE_BYTES);
    A* stats = red + 3 * Share::PARTS * R;
    A* totals = stats + 5 * R;
    const i64 groups = (a.M + R - 1) / R, tiles = a.rows / a.M * groups;
    const i64 panels = (a.N + PANEL - 1) / PANEL;

    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        const i64 outer = t / groups, m = (t - outer * groups) * R;
        const int rows = at_most(a.M - m, R);
        const X* from_x = a.x + outer * a.x_outer + m * a.x_row;
        const X* from_dy = a.dy + outer * a.dy_outer + m * a.dy_row;
        X* to = a.dx + outer * a.dx_outer + m * a.dx_row;
        get_stats<THREADS, R>(stats, a, outer, m, rows);
        TileSums<Share::PAIR, Share::J, A> sums;
        sums.clear();
        // Panels 0, 1, ..., panels - 1 for the sums, then back to 0 for dx.
        for (i64 step = 0; step < 2 * panels; ++step) {
            const i64 first = (step < panels ? step : 2 * panels - 1 - step) * PANEL;
            const int cols = at_most(a.N - first, PANEL);
            const W* weight = HAS_WEIGHT ? a.weight + first : a.weight;
            if (step != panels) {
                __syncthreads();  // the panel before is done with
                get_tile<THREADS, R, X_ROWS>(x, from_x, a.x_row, a.x_col, first, rows, cols);
                get_tile<THREADS, R, DY_ROWS>(dy, from_dy, a.dy_row, a.dy_col, first, rows, cols);
                staged();
                __syncthreads();
            }
            if (step < panels) {
                add_gradients<THREADS, R, HAS_WEIGHT>(x, dy, weight, rows, cols, stats, sums);
                if (step < panels - 1) continue;
                put_gradients<THREADS, R, X>(sums, a.N, red, stats);
                __syncthreads();
                continue;
            }
            if (DWEIGHT || DBIAS)  // each thread its own
                for (int i = threadIdx.x; i < 2 * a.slots; i += THREADS) totals[i] = 0;
            differentiate_tile<THREADS, R, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(
                x, dy, weight, rows, cols, stats, totals, (int)a.slots);
            __syncthreads();  // dx and the sums are read by others than made them
            if (DX) put_tile<THREADS, R, X_ROWS>(x, to + first * a.dx_col, a.dx_row, a.dx_col, rows, cols);
            A* partials = a.partials + (i64)blockIdx.x * a.N + first;
            if (DWEIGHT) add_partials<THREADS>(partials, totals, cols, t == blockIdx.x);
            if (DBIAS)
                add_partials<THREADS>(
                    partials + (DWEIGHT ? (i64)gridDim.x * a.N : 0), totals + a.slots, cols, t == blockIdx.x);
        }
    }
}
