// K6: arrays whose normalized axis is strided. A block takes R neighbouring rows through a tile in shared
// memory: read along the rows or along the columns, written either way, so that a column-major matrix
// becomes a row-major one in the same pass. Rows that are longer than a panel of the tile are swept
// twice, the second time backwards, as the last panel is still there and the ones before it in L2.

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

// Columns [first, first + cols) of a tile, in whichever layout they have.
template <int THREADS, int R, bool ROWS, class X>
__device__ __forceinline__ void get_tile(
    X* tile, const X* from, i64 row_stride, i64 col_stride, i64 first, int rows, int cols) {
    if (ROWS)
        load_along_rows<THREADS, R>(tile, from + first * col_stride, col_stride, rows, cols);
    else
        load_along_columns<THREADS, R>(tile, from + first, row_stride, rows, cols);
}

template <class Op, int THREADS, int R, bool IN_ROWS, bool OUT_ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_column(const ColumnArguments<X, W, B>& a, i64 panel) {
    DYNAMIC_SHARED(shared);
    X* tile = (X*)shared;
    const i64 groups = (a.M + R - 1) / R;
    const i64 outer = blockIdx.x / groups, m = (blockIdx.x - outer * groups) * R;
    const int rows = at_most(a.M - m, R);
    const auto get = [&](i64 first, int cols) {
        const X* x = a.x + outer * a.x_outer + m * a.x_row;
        get_tile<THREADS, R, IN_ROWS>(tile, x, a.x_row, a.x_col, first, rows, cols);
        staged();
    };
    const auto tell = [&](int r, const RowStats<typename Accumulator<X>::type>& stats) {
        store_stats(a.mean, a.rstd, outer * a.stats_outer + (m + r) * a.stats_row, stats);
    };
    const auto to = [&](i64 first) { return a.y + outer * a.y_outer + m * a.y_row + first * a.y_col; };
    normalize_tile<Op, THREADS, R, OUT_ROWS, false, HAS_WEIGHT, HAS_BIAS>(
        tile, panel, to, a.y_row, a.y_col, a.weight, a.bias, rows, a.N, a.eps, get, tell);
}

// ---- backward --------------------------------------------------------------------------------------------
// A tile of x and one of dy, so that each is read once in whichever layout it has and dx
// is written once in x's. The grid is as large as the device holds; each block goes from tile to tile
// and keeps its sums over rows in shared memory.
//
// Rows that are longer than a panel of the tiles are swept twice, first for the sums of the rows, then
// backwards for dx and the sums over rows: all but the last panel is read twice. The sums of a row are
// those of one tile, as a panel has a whole number of classes' rounds. The block then adds its sums over
// rows to its own partials after each panel.
//
// A row's sums are taken by threads that stand on rows, dx and the sums over rows by threads that stand
// on columns, which therefore need no exchange. Shared memory: X x[panel][PITCH], X dy[panel][PITCH], then
// A red[3][PARTS][R], A stats[5][R] (mean, rstd, lack, c1, c2), A totals[2][slots].

template <class X, class W>
struct ColumnGradientArguments {
    typedef typename Accumulator<X>::type A;
    const X* dy;
    const X* x;
    const A* mean;
    const A* rstd;
    const W* weight;  // (N,) or null
    X* dx;
    A* partials;  // [dweight, dbias][blocks][N]
    i64 rows, M;
    i64 dy_outer, dy_row, dy_col, x_outer, x_row, x_col, dx_outer, dx_row, dx_col;  // element strides
    i64 stats_outer, stats_row;                                                     // of mean and rstd
    i64 slots;  // of totals: THREADS for each run of neighbouring columns
    i64 N;
};

// How many neighbouring columns the threads of a block stand on: a power of two from 8 to THREADS.
template <int THREADS>
__device__ __forceinline__ int column_span(int N) {
    int span = 8;
    while (span < N && span < THREADS) span *= 2;
    return span;
}

// sum(h), sum(g) and sum(g * h) of the rows of a word, by class.
template <int PAIR, int J, class A>
struct TileSums {
    A h[PAIR][J], g[PAIR][J], gh[PAIR][J];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
#pragma unroll
            for (int j = 0; j < J; ++j) h[i][j] = g[i][j] = gh[i][j] = 0;
        }
    }
};

// What a thread adds up of a tile: one word of rows, J classes.
template <int THREADS, int R, class X>
struct TileShare {
    static constexpr int PAIR = Tile<X, R>::PAIR, LANES = R / PAIR, PARTS = THREADS / LANES, J = TILE_CLASSES / PARTS;
};

// Adds `cols` columns to the sums of each row. Of several such runs all but the last have a multiple of
// TILE_CLASSES columns.
template <class Op, int THREADS, int R, bool HAS_WEIGHT, class X, class W, class A, int PAIR, int J>
__device__ __forceinline__ void add_gradients(
    const X* x, const X* dy, const W* weight, int rows, int cols, const A* stats, TileSums<PAIR, J, A>& sums) {
    typedef Tile<X, R> Shape;
    typedef TileShare<THREADS, R, X> Share;
    const int r = threadIdx.x % Share::LANES * PAIR, part = threadIdx.x / Share::LANES;
    const int end = r < rows ? cols : 0;
    A mean[PAIR], rstd[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        mean[i] = stats[r + i];
        rstd[i] = stats[R + r + i];
    }
    for (int n = part * J; n < end; n += TILE_CLASSES) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            if (n + j >= end) break;
            A v[PAIR], s[PAIR];
            read_word(x + (n + j) * Shape::PITCH + r, v);
            read_word(dy + (n + j) * Shape::PITCH + r, s);
            const A w = HAS_WEIGHT ? weight_of<Op>((A)to_float(weight[n + j])) : (A)1;
#pragma unroll
            for (int i = 0; i < PAIR; ++i) {
                v[i] = product(v[i] - mean[i], rstd[i]);
                if (HAS_WEIGHT) s[i] = product(s[i], w);
                if (Op::center) {
                    sums.h[i][j] += v[i];
                    sums.g[i][j] += s[i];
                }
                sums.gh[i][j] = multiply_add(s[i], v[i], sums.gh[i][j]);
            }
        }
    }
}

// What the sums of each row come to, into `stats`.
template <class Op, int THREADS, int R, class X, class A, int PAIR, int J>
__device__ __forceinline__ void put_gradients(const TileSums<PAIR, J, A>& sums, i64 N, A* red, A* stats) {
    typedef TileShare<THREADS, R, X> Share;
    constexpr int PARTS = Share::PARTS;
    const int r = threadIdx.x % Share::LANES * PAIR, part = threadIdx.x / Share::LANES;
    A sum[3][PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        sum[0][i] = tree_sum(sums.h[i]);
        sum[1][i] = tree_sum(sums.g[i]);
        sum[2][i] = tree_sum(sums.gh[i]);
    }
    if (PARTS > 1) {
#pragma unroll
        for (int k = 0; k < 3; ++k) put_part<PARTS, R>(red + k * PARTS * R, part, r, sum[k]);
        __syncthreads();
        if (part) return;
#pragma unroll
        for (int k = 0; k < 3; ++k) add_parts<PARTS, R>(red + k * PARTS * R, r, sum[k]);
    }
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        const RowGradient<A> c = row_gradient<Op>(GradientSums<A>{sum[0][i], sum[1][i], sum[2][i]}, N);
        stats[2 * R + r + i] = c.lack;
        stats[3 * R + r + i] = c.c1;
        stats[4 * R + r + i] = c.c2;
    }
}

// Mean and rstd of a tile's rows; of those that do not exist, zero.
template <class Op, int THREADS, int R, class X, class W, class A>
__device__ __forceinline__ void get_stats(
    A* stats, const ColumnGradientArguments<X, W>& a, i64 outer, i64 m, int rows) {
    for (int r = threadIdx.x; r < R; r += THREADS) {
        const i64 at = outer * a.stats_outer + (m + r) * a.stats_row;
        stats[r] = Op::center && r < rows ? a.mean[at] : (A)0;
        stats[R + r] = r < rows ? a.rstd[at] : (A)0;
    }
}

// Turns the tile of x into dx and adds to `totals` what each thread's columns have of dweight and dbias.
template <class Op, int THREADS, int R, bool DX, bool DWEIGHT, bool DBIAS, bool HAS_WEIGHT, class X, class W, class A>
__device__ __forceinline__ void differentiate_tile(
    X* x, const X* dy, const W* weight, int rows, int N, const A* stats, A* totals, int slots) {
    typedef Tile<X, R> Shape;
    const int span = column_span<THREADS>(N), lane = threadIdx.x % 32;
    const int turns = span < 32 ? R * span / 32 : R * span / THREADS;
    for (int n = threadIdx.x % span, slot = threadIdx.x; n < N; n += span, slot += THREADS) {
        const A w = HAS_WEIGHT ? weight_of<Op>((A)to_float(weight[n])) : (A)1;
        A dweight = 0, dbias = 0;
        for (int i = span < 32 ? threadIdx.x / 32 : 0; i < turns; i += span < 32 ? THREADS / 32 : 1) {
            const int r = span < 32 ? row_of_turn(i, lane, span) : i * (THREADS / span) + (int)threadIdx.x / span;
            if (r >= rows) continue;
            const A rstd = stats[R + r];
            const A s = (A)to_float(dy[n * Shape::PITCH + r]);
            const A x_hat = product((A)to_float(x[n * Shape::PITCH + r]) - stats[r], rstd) - stats[2 * R + r];
            if (DWEIGHT) dweight = multiply_add(s, x_hat, dweight);
            if (DBIAS) dbias += s;
            if (DX) {
                const A g = HAS_WEIGHT ? product(s, w) : s;
                const A dx = rstd * multiply_add(-x_hat, stats[4 * R + r], g - stats[3 * R + r]);
                x[n * Shape::PITCH + r] = rounded(dx, (const X*)0);
            }
        }
        if (DWEIGHT) totals[slot] += dweight;
        if (DBIAS) totals[slots + slot] += dbias;
    }
}

// What the threads that stood on column n of N have added up.
template <int THREADS, class A>
__device__ __forceinline__ A column_total(const A* totals, int n, int N) {
    const int span = column_span<THREADS>(N), first = n / span * THREADS;
    A total = 0;
    for (int g = first + n % span; g < first + THREADS; g += span) total += totals[g];
    return total;
}

// Writes a tile as it is, along the rows or along the columns.
template <int THREADS, int R, bool ROWS, class X>
__device__ __forceinline__ void put_tile(const X* tile, X* to, i64 row_stride, i64 col_stride, int rows, int N) {
    typedef Tile<X, R> Shape;
    typedef Word<X, Shape::PAIR> Wd;
    if (ROWS) {
        constexpr int PAIR = Shape::PAIR, LANES = R / PAIR, PARTS = THREADS / LANES;
        const int lane = threadIdx.x % LANES;
        const bool whole = ((u64)to & (sizeof(Wd) - 1)) == 0 && col_stride % PAIR == 0 && rows % PAIR == 0;
        for (int n = threadIdx.x / LANES; n < N; n += PARTS) {
            const X* from = tile + n * Shape::PITCH;
            X* at = to + n * col_stride;
            if (whole) {
                if (lane * PAIR < rows) store_word(at + lane * PAIR, *(const Wd*)(from + lane * PAIR));
            } else {  // as load_along_rows
#pragma unroll
                for (int i = 0; i < PAIR; ++i)
                    if (i * LANES + lane < rows) at[i * LANES + lane] = from[i * LANES + lane];
            }
        }
    } else {
        const bool twos = in_twos(to, row_stride);
        const int span = span_of(twos ? (N + 1) / 2 : N), lane = threadIdx.x % 32;
        for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
            const int r = row_of_turn(i, lane, span);
            if (r >= rows) continue;
            if (!twos) {
                for (int n = lane % span; n < N; n += span) to[r * row_stride + n] = tile[n * Shape::PITCH + r];
                continue;
            }
            for (int n = lane % span * 2; n < N; n += span * 2) {
                const X* from = tile + n * Shape::PITCH + r;
                Word<X, 2> two;
                if (n + 1 < N) {
                    get_two(from, Shape::PITCH, first_of_two(lane, span), two.e);
                    store_word(to + r * row_stride + n, two);
                } else {
                    to[r * row_stride + n] = from[0];
                }
            }
        }
    }
}

// Adds what the threads of a block hold of `cols` columns to the block's partials at `to`; the first
// time there is nothing there.
template <int THREADS, class A>
__device__ __forceinline__ void add_partials(A* to, const A* totals, int cols, bool first) {
    for (int n = threadIdx.x; n < cols; n += THREADS) {
        const A total = column_total<THREADS>(totals, n, cols);
        to[n] = first ? total : to[n] + total;
    }
}

// PANELS: whether there may be more than one. Where it is known that there is not, 80 registers do.
template <class Op, int THREADS, int R, bool PANELS, bool X_ROWS, bool DY_ROWS, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void norm_bwd_column(const ColumnGradientArguments<X, W>& a, i64 panel) {
    typedef typename Accumulator<X>::type A;
    typedef Tile<X, R> Shape;
    typedef TileShare<THREADS, R, X> Share;
    DYNAMIC_SHARED(shared);
    const int tile_bytes = ((int)panel * Shape::PITCH * (int)sizeof(X) + 15) / 16 * 16;
    X* x = (X*)shared;
    X* dy = (X*)(shared + tile_bytes);
    A* red = (A*)(shared + 2 * tile_bytes);
    A* stats = red + 3 * Share::PARTS * R;
    A* totals = stats + 5 * R;
    const i64 groups = (a.M + R - 1) / R, tiles = a.rows / a.M * groups;
    const i64 last = PANELS ? (a.N - 1) / panel * panel : 0, step = PANELS ? panel : 1;
    const auto leave = [&](i64 first, int cols, bool alone) {
        A* to = a.partials + (i64)blockIdx.x * a.N + first;
        if (DWEIGHT) add_partials<THREADS>(to, totals, cols, alone);
        if (DBIAS) add_partials<THREADS>(to + (DWEIGHT ? (i64)gridDim.x * a.N : 0), totals + a.slots, cols, alone);
    };

    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        const i64 outer = t / groups, m = (t - outer * groups) * R;
        const int rows = at_most(a.M - m, R);
        const auto get = [&](i64 first, int cols) {
            __syncthreads();  // the panel before is done with
            const X* from = a.x + outer * a.x_outer + m * a.x_row;
            get_tile<THREADS, R, X_ROWS>(x, from, a.x_row, a.x_col, first, rows, cols);
            from = a.dy + outer * a.dy_outer + m * a.dy_row;
            get_tile<THREADS, R, DY_ROWS>(dy, from, a.dy_row, a.dy_col, first, rows, cols);
            staged();
            __syncthreads();
        };
        get_stats<Op, THREADS, R>(stats, a, outer, m, rows);  // those of the tile before were read
        TileSums<Share::PAIR, Share::J, A> sums;
        sums.clear();
        for (i64 first = 0; first <= last; first += step) {
            const int cols = at_most(a.N - first, (int)panel);
            get(first, cols);
            const W* weight = HAS_WEIGHT ? a.weight + first : a.weight;
            add_gradients<Op, THREADS, R, HAS_WEIGHT>(x, dy, weight, rows, cols, stats, sums);
        }
        put_gradients<Op, THREADS, R, X>(sums, a.N, red, stats);
        __syncthreads();
        for (i64 first = last; first >= 0; first -= step) {
            const int cols = at_most(a.N - first, (int)panel);
            if (first < last) get(first, cols);
            const W* weight = HAS_WEIGHT ? a.weight + first : a.weight;
            if ((DWEIGHT || DBIAS) && (last || t == blockIdx.x))  // each thread its own
                for (int k = threadIdx.x; k < 2 * a.slots; k += THREADS) totals[k] = 0;
            differentiate_tile<Op, THREADS, R, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(
                x, dy, weight, rows, cols, stats, totals, (int)a.slots);
            __syncthreads();  // dx and the sums are read by others than made them
            X* to = a.dx + outer * a.dx_outer + m * a.dx_row + first * a.dx_col;
            if (DX) put_tile<THREADS, R, X_ROWS>(x, to, a.dx_row, a.dx_col, rows, cols);
            if (last) leave(first, cols, t == blockIdx.x);
        }
    }
    if (!last) leave(0, (int)a.N, true);
}
