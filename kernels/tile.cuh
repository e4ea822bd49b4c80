// A tile: R neighbouring rows of one batch, column by column in shared memory, for arrays whose memory
// runs along the rows and not along the columns. A thread looks at the rows of one word: one row, two
// of a 16-bit type.
//
// The pitch between columns is an odd number of words, so neither lanes that stand on neighbouring
// rows nor lanes that stand on neighbouring columns meet in a bank: the transposition costs nothing.

template <class T, int R>
struct Tile {
    static constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;  // rows of one word
    static constexpr int PITCH = R + PAIR;               // elements from a column to the next
};

// The rows of one word.
template <class T, int PAIR>
struct alignas(PAIR * sizeof(T)) Word {
    T e[PAIR];
};

// To global memory in one instruction: of two halves the compiler would make two.
template <class T, int PAIR>
__device__ __forceinline__ void store_word(T* to, const Word<T, PAIR>& word) {
    if constexpr (sizeof(word) == 4 && PAIR == 2)
        *(u32*)to = bit_cast<u32>(word);
    else
        *(Word<T, PAIR>*)to = word;
}

// Column n belongs to class n % 8, and a class is added up in order; the eight sums meet in one tree.
// How many threads share a row, and how many rows a tile has, moves no bit of the result.
enum { TILE_CLASSES = 8 };
// Columns whose moments are taken together; longer rows merge them in order. So many fit the smallest
// shared memory at the narrowest tile.
template <class T>
struct TileChunk {
    static constexpr int cols = sizeof(T) == 8 ? 128 : 256;
};

// ---- from global to shared memory ------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T zero_of() {
    T zero;
    unsigned char* bytes = (unsigned char*)&zero;
#pragma unroll
    for (int i = 0; i < (int)sizeof(T); ++i) bytes[i] = 0;
    return zero;
}

// `cols` columns at x whose rows lie next to each other; `rows` of them exist.
template <int THREADS, int R, class T>
__device__ __forceinline__ void load_along_rows(T* tile, const T* x, i64 col_stride, int rows, int cols) {
    typedef Tile<T, R> Shape;
    typedef Word<T, Shape::PAIR> Wd;
    constexpr int LANES = R / Shape::PAIR, PARTS = THREADS / LANES;
    const int lane = threadIdx.x % LANES, filled = (rows + Shape::PAIR - 1) / Shape::PAIR * Shape::PAIR;
    // A pair must lie on a boundary of four bytes in every column, and exist.
    if (((u64)x & (sizeof(Wd) - 1)) == 0 && col_stride % Shape::PAIR == 0 && rows == filled) {
        const int r = lane * Shape::PAIR;
        if (r >= rows) return;
        for (int n = threadIdx.x / LANES; n < cols; n += PARTS)
            stage((Wd*)(tile + n * Shape::PITCH + r), (const Wd*)(x + n * col_stride + r));
        return;
    }
    // Else neighbours take neighbouring rows: a pair to a lane, one row after the other, would ask for
    // each sector twice.
#pragma unroll 2  // of four columns sm_75 would spill
    for (int n = threadIdx.x / LANES; n < cols; n += PARTS) {
#pragma unroll
        for (int i = 0; i < Shape::PAIR; ++i) {
            const int r = i * LANES + lane;
            if (r < filled) tile[n * Shape::PITCH + r] = r < rows ? x[n * col_stride + r] : zero_of<T>();
        }
    }
}

// Lanes along the columns: how many stand on one row.
__device__ __forceinline__ int span_of(int cols) { return cols > 16 ? 32 : cols > 8 ? 16 : 8; }

// The row that a lane stands on when its warp takes its i-th turn. Were the four rows of short ones
// (span 8) neighbours, four lanes would meet in one bank.
__device__ __forceinline__ int row_of_turn(int i, int lane, int span) {
    const int g = lane / span;
    return span == 8 ? i / 4 * 16 + i % 4 * 2 + g % 2 + g / 2 * 8 : i * (32 / span) + g;
}

// Whether lanes may take two columns of 16 bits at once from rows at `p`.
template <class T>
__device__ __forceinline__ bool in_twos(const T* p, i64 row_stride) {
    return sizeof(T) == 2 && ((u64)p & 3u) == 0 && row_stride % 2 == 0;
}

// Of 32 lanes on columns 0, 2, 4, ... the upper half turns to its second column first: on even columns
// alone they would meet in half of the banks.
__device__ __forceinline__ int first_of_two(int lane, int span) { return span == 32 ? lane / 16 : 0; }

// Columns n and n + 1 of a row of a tile; `at` is the first one's place.
template <class T>
__device__ __forceinline__ void get_two(const T* at, int pitch, int first, T (&two)[2]) {
    const T a = at[first * pitch], b = at[(1 - first) * pitch];
    two[0] = first ? b : a;
    two[1] = first ? a : b;
}
template <class T>
__device__ __forceinline__ void put_two(T* at, int pitch, int first, const T (&two)[2]) {
    at[first * pitch] = first ? two[1] : two[0];
    at[(1 - first) * pitch] = first ? two[0] : two[1];
}

// `rows` rows at x whose columns lie next to each other.
template <int THREADS, int R, class T>
__device__ __forceinline__ void load_along_columns(T* tile, const T* x, i64 row_stride, int rows, int cols) {
    typedef Tile<T, R> Shape;
    const bool twos = in_twos(x, row_stride);
    const int span = span_of(twos ? (cols + 1) / 2 : cols), lane = threadIdx.x % 32;
    const int filled = (rows + Shape::PAIR - 1) / Shape::PAIR * Shape::PAIR;  // both rows of each word
    for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
        const int r = row_of_turn(i, lane, span);
        if (r >= filled) continue;
        if (!twos) {
            for (int n = lane % span; n < cols; n += span)
                tile[n * Shape::PITCH + r] = r < rows ? x[r * row_stride + n] : zero_of<T>();
            continue;
        }
        for (int n = lane % span * 2; n < cols; n += span * 2) {
            Word<T, 2> two = {{zero_of<T>(), zero_of<T>()}};
            if (r < rows && n + 1 < cols)
                two = *(const Word<T, 2>*)(x + r * row_stride + n);
            else if (r < rows)
                two.e[0] = x[r * row_stride + n];
            if (n + 1 < cols)
                put_two(tile + n * Shape::PITCH + r, Shape::PITCH, first_of_two(lane, span), two.e);
            else
                tile[n * Shape::PITCH + r] = two.e[0];
        }
    }
}

// ---- statistics of the rows of a tile --------------------------------------------------------------

// Adds the values that the PARTS threads of a row hold, through A red[PARTS][R].
template <int PARTS, int R, int PAIR, class A>
__device__ __forceinline__ void put_part(A* red, int part, int r, const A (&v)[PAIR]) {
    Word<A, PAIR> word;
#pragma unroll
    for (int i = 0; i < PAIR; ++i) word.e[i] = v[i];
    *(Word<A, PAIR>*)(red + part * R + r) = word;
}
template <int PARTS, int R, int PAIR, class A>
__device__ __forceinline__ void add_parts(const A* red, int r, A (&v)[PAIR]) {
    A t[PAIR][PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const Word<A, PAIR> word = *(const Word<A, PAIR>*)(red + p * R + r);
#pragma unroll
        for (int i = 0; i < PAIR; ++i) t[i][p] = word.e[i];
    }
#pragma unroll
    for (int i = 0; i < PAIR; ++i) v[i] = tree_sum(t[i]);
}

template <class T, int PAIR, class A>
__device__ __forceinline__ void read_word(const T* at, A (&out)[PAIR]) {
    const Word<T, PAIR> word = *(const Word<T, PAIR>*)at;
#pragma unroll
    for (int i = 0; i < PAIR; ++i) out[i] = (A)to_float(word.e[i]);
}

// How the rows of a thread's word are looked at, and whether they still are.
template <class Op, class X, int PAIR>
struct TileLook {
    Look<Op, X> of[PAIR];
    bool open[PAIR];
    bool first;

    __device__ __forceinline__ TileLook() : first(true) {
#pragma unroll
        for (int i = 0; i < PAIR; ++i) open[i] = true;
    }
};

// Moments of `cols` columns (a chunk at most) for the rows of this thread's word, and how many elements
// they are of: with OMIT those that are not NaN. Every thread of a row gets the same. Shared memory:
// A red[3 + OMIT][PARTS][R]; each part is written before one barrier and read after it, and the next
// chunk comes to it only after another.
template <class Op, int THREADS, int R, bool OMIT, class T, class X, class A, int PAIR>
__device__ __forceinline__ void tile_moments(
    const T* tile, int rows, int cols, A p, A* red, const TileLook<Op, X, PAIR>& look, Moments<A> (&m)[PAIR],
    A (&count)[PAIR]) {
    typedef Tile<T, R> Shape;
    constexpr int LANES = R / PAIR, PARTS = THREADS / LANES, J = TILE_CLASSES / PARTS, SIZE = PARTS * R;
    const int r = threadIdx.x % LANES * PAIR, part = threadIdx.x / LANES;
    const int end = r < rows ? cols : 0;  // what lies past the rows that exist was never written
    A s[PAIR][J], c[PAIR][J], sum[PAIR], mean[PAIR], factor[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        count[i] = (A)cols;
        mean[i] = look.of[i].mean;
        factor[i] = Range<X>::everywhere ? p : p * look.of[i].scale;
#pragma unroll
        for (int j = 0; j < J; ++j) s[i][j] = c[i][j] = 0;
    }
    if (OMIT || (Op::center && look.first)) {
        for (int n = part * J; n < end; n += TILE_CLASSES) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                if (n + j >= end) break;
                A v[PAIR];
                read_word(tile + (n + j) * Shape::PITCH + r, v);
#pragma unroll
                for (int i = 0; i < PAIR; ++i) {
                    if (OMIT && v[i] != v[i]) continue;
                    s[i][j] += v[i];
                    c[i][j] += 1;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            sum[i] = tree_sum(s[i]);
            if (OMIT) count[i] = tree_sum(c[i]);
        }
        if (PARTS > 1) {
            put_part<PARTS, R>(red, part, r, sum);
            if (OMIT) put_part<PARTS, R>(red + 3 * SIZE, part, r, count);
            __syncthreads();
            add_parts<PARTS, R>(red, r, sum);
            if (OMIT) add_parts<PARTS, R>(red + 3 * SIZE, r, count);
        }
#pragma unroll
        for (int i = 0; i < PAIR; ++i)
            if (!look.of[i].again()) mean[i] = sum[i] / count[i];
    } else if (PARTS > 1) {
        __syncthreads();  // what the chunk before has left in `red` is still read
    }
    A sq[PAIR][J], squares[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
#pragma unroll
        for (int j = 0; j < J; ++j) s[i][j] = sq[i][j] = 0;
    }
    for (int n = part * J; n < end; n += TILE_CLASSES) {
#pragma unroll
        for (int j = 0; j < J; ++j) {
            if (n + j >= end) break;
            A v[PAIR];
            read_word(tile + (n + j) * Shape::PITCH + r, v);
#pragma unroll
            for (int i = 0; i < PAIR; ++i) {
                if (OMIT && v[i] != v[i]) continue;
                v[i] = Op::center ? multiply_add(v[i], factor[i], -mean[i] * p) : v[i] * factor[i];
                if (Op::center) s[i][j] += v[i];
                sq[i][j] = multiply_add(v[i], v[i], sq[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        sum[i] = tree_sum(s[i]);
        squares[i] = tree_sum(sq[i]);
    }
    if (PARTS > 1) {
        if (Op::center) put_part<PARTS, R>(red + SIZE, part, r, sum);
        put_part<PARTS, R>(red + 2 * SIZE, part, r, squares);
        __syncthreads();
        if (Op::center) add_parts<PARTS, R>(red + SIZE, r, sum);
        add_parts<PARTS, R>(red + 2 * SIZE, r, squares);
    }
#pragma unroll
    for (int i = 0; i < PAIR; ++i) m[i] = corrected<Op>(mean[i], sum[i], squares[i], p, count[i]);
}

// What is known of the rows of a word after some chunks.
template <int PAIR, class A>
struct TileRuns {
    A shift[PAIR];
    Run<A> run[PAIR];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            shift[i] = 0;
            run[i] = Run<A>{0, 0, 0};
        }
    }
};

// Takes in the chunks of a panel of `cols` columns. The first chunk that holds anything gives the shift
// that the means are told from.
template <class Op, int THREADS, int R, bool OMIT, class T, class X, class A, int PAIR>
__device__ __forceinline__ void add_panel(
    const T* tile, int rows, int cols, A p, A* red, const TileLook<Op, X, PAIR>& look, TileRuns<PAIR, A>& t) {
    constexpr int CHUNK = TileChunk<T>::cols;
    for (int c = 0; c < cols; c += CHUNK) {
        const int n = cols - c < CHUNK ? cols - c : CHUNK;
        Moments<A> m[PAIR];
        A count[PAIR];
        tile_moments<Op, THREADS, R, OMIT>(tile + c * Tile<T, R>::PITCH, rows, n, p, red, look, m, count);
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            if (OMIT && count[i] == 0) continue;
            if (t.run[i].count == 0) t.shift[i] = m[i].hi;
            t.run[i] = merge(t.run[i], run_of(m[i], count[i], t.shift[i]), p);
        }
    }
}

// The statistics of a row of which `run` has told all. Without a valid element all are NaN.
template <class Op, class A>
__device__ __forceinline__ RowStats<A> tile_stats(const Run<A>& run, A shift, A p, A scale, double eps) {
    RowStats<A> stats = row_stats(Moments<A>{shift, run.mean, run.m2}, p, scale, run.count, eps);
    if (run.count == 0) stats.mean = stats.rstd;
    return stats;
}

// Puts the statistics of what has been looked at into A stats[4][R] of shared memory, and says whether some
// row of the block has to be looked at again. Every thread must come here.
template <class Op, int R, class X, class A, int PAIR>
__device__ __forceinline__ bool take_stats(
    TileLook<Op, X, PAIR>& look, const TileRuns<PAIR, A>& runs, int r, bool writes, A p, i64 N, double eps, A* stats) {
    bool again = false;
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        if (!look.open[i]) continue;
        const Run<A>& run = runs.run[i];
        if (writes) {
            const RowStats<A> found = tile_stats<Op>(run, runs.shift[i], p, look.of[i].scale, eps);
            stats[r + i] = found.mean;
            stats[R + r + i] = found.rstd;
            stats[2 * R + r + i] = found.shift;
            stats[3 * R + r + i] = found.scale;
        }
        look.open[i] = look.of[i].next(runs.shift[i], run.mean, run.m2, N, eps);
        again = again || look.open[i];
    }
    look.first = false;
    if (Range<X>::everywhere) {
        __syncthreads();
        return false;
    }
    return __syncthreads_or(again);
}

template <int R, class A>
__device__ __forceinline__ RowStats<A> stats_of(const A* stats, int r) {
    return RowStats<A>{stats[r], stats[R + r], stats[2 * R + r], stats[3 * R + r]};
}

// ---- from a tile to y: normalized, and written along the rows or along the columns ---------------------

// One column of the rows of a warp, where pairs of 16-bit rows lie on no boundary: lanes write rows that
// are neighbours. Each its own two, one after the other, they would touch every sector twice.
template <class Y>
__device__ __forceinline__ void store_by_turns(Y* y, const Word<Y, 2>& mine, int rows, int lane) {
    const u32 word = bit_cast<u32>(mine);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 other = __shfl_sync(0xffffffffu, word, half * 16 + lane / 2, 32);
        const int r = half * 32 + lane;
        if (r < rows) y[r] = Y{(u16)(other >> 16 * (lane % 2))};
    }
}

// Columns [first, first + cols) of a y whose rows lie next to each other; each thread has its own rows,
// and their statistics.
template <class Op, int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A, int PAIR>
__device__ __forceinline__ void store_along_rows(
    const T* tile, Y* y, i64 col_stride, const W* weight, const B* bias, i64 first, int rows, int cols,
    const RowStats<A> (&stats)[PAIR]) {
    typedef Word<Y, PAIR> Wd;
    constexpr int LANES = R / PAIR, PARTS = THREADS / LANES;
    const int r = threadIdx.x % LANES * PAIR, lane = threadIdx.x % 32;
    const bool whole = ((u64)y & (sizeof(Wd) - 1)) == 0 && col_stride % PAIR == 0 && rows % PAIR == 0;
    for (int n = threadIdx.x / LANES; n < cols; n += PARTS) {
        const A w = HAS_WEIGHT ? weight_of<Op>((A)to_float(weight[first + n])) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(bias[first + n]) : (A)0;
        A t[PAIR];
        Wd out;
#pragma unroll
        for (int i = 0; i < PAIR; ++i) t[i] = 0;
        if (r < rows) read_word(tile + n * Tile<T, R>::PITCH + r, t);
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            out.e[i] = rounded(affine<HAS_WEIGHT, HAS_BIAS>(normalized<Op, T>(t[i], stats[i]), w, b), (const Y*)0);
        }
        Y* to = y + n * col_stride;
        if constexpr (PAIR == 2) {
            if (!whole) {  // of all threads or of none
                const int begin = r - 2 * lane;  // of the warp's rows
                store_by_turns(to + begin, out, rows - begin, lane);
                continue;
            }
        }
        if (r < rows) store_word(to + r, out);
    }
}

// Of a y of 16 bits whose columns lie next to each other, two at once: a warp writes 128 bytes.
template <class Op, int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A>
__device__ __forceinline__ void store_twos(
    const T* tile, Y* y, i64 row_stride, const W* weight, const B* bias, i64 first, int rows, int cols,
    const A* stats) {
    constexpr int PITCH = Tile<T, R>::PITCH;
    const int span = span_of((cols + 1) / 2), lane = threadIdx.x % 32;
    for (int n = lane % span * 2; n < cols; n += span * 2) {
        const bool both = n + 1 < cols;
        A w[2], b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            w[j] = HAS_WEIGHT && (!j || both) ? weight_of<Op>((A)to_float(weight[first + n + j])) : (A)0;
            b[j] = HAS_BIAS && (!j || both) ? (A)to_float(bias[first + n + j]) : (A)0;
        }
        for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
            const int r = row_of_turn(i, lane, span);
            if (r >= rows) continue;
            T x[2];
            if (both)
                get_two(tile + n * PITCH + r, PITCH, first_of_two(lane, span), x);
            else
                x[0] = x[1] = tile[n * PITCH + r];
            Word<Y, 2> out;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const A x_hat = normalized<Op, T>((A)to_float(x[j]), stats_of<R>(stats, r));
                out.e[j] = rounded(affine<HAS_WEIGHT, HAS_BIAS>(x_hat, w[j], b[j]), (const Y*)0);
            }
            Y* to = y + r * row_stride + n;
            if (both)
                store_word(to, out);
            else
                to[0] = out.e[0];
        }
    }
}

// The same of a y whose columns lie next to each other, or anyhow; the statistics of all rows are in
// A stats[4][R] of shared memory.
template <class Op, int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A>
__device__ __forceinline__ void store_along_columns(
    const T* tile, Y* y, i64 row_stride, i64 col_stride, const W* weight, const B* bias, i64 first, int rows,
    int cols, const A* stats) {
    if (col_stride == 1 && in_twos(y, row_stride)) {
        store_twos<Op, THREADS, R, HAS_WEIGHT, HAS_BIAS>(tile, y, row_stride, weight, bias, first, rows, cols, stats);
        return;
    }
    const int span = span_of(cols), lane = threadIdx.x % 32;
    for (int n = lane % span; n < cols; n += span) {
        const A w = HAS_WEIGHT ? weight_of<Op>((A)to_float(weight[first + n])) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(bias[first + n]) : (A)0;
        for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
            const int r = row_of_turn(i, lane, span);
            if (r >= rows) continue;
            const A x = (A)to_float(tile[n * Tile<T, R>::PITCH + r]);
            const A x_hat = normalized<Op, T>(x, stats_of<R>(stats, r));
            y[r * row_stride + n * col_stride] = rounded(affine<HAS_WEIGHT, HAS_BIAS>(x_hat, w, b), (const Y*)0);
        }
    }
}

// ---- the rows of a block, panel by panel: their statistics, then y, backwards ---------------------------

// `get(first, cols)` brings columns to the tile, as the next barrier shows; `to(first)` is where y's are;
// `tell(i, stats)` is given the statistics of row i, of this thread's word. Shared memory: T tile[panel][PITCH], A red[3 + OMIT][PARTS][R], A stats[4][R].
template <class Op, int THREADS, int R, bool OUT_ROWS, bool OMIT, bool HAS_WEIGHT, bool HAS_BIAS, class T, class W, class B, class To, class Get, class Tell>
__device__ __forceinline__ void normalize_tile(
    T* tile, i64 panel, const To& to, i64 y_row, i64 y_col, const W* weight, const B* bias, int rows, i64 N, double eps,
    const Get& get, const Tell& tell) {
    typedef typename Accumulator<T>::type A;
    typedef Tile<T, R> Shape;
    constexpr int PAIR = Shape::PAIR, LANES = R / PAIR, PARTS = THREADS / LANES;
    A* red = (A*)((unsigned char*)tile + (panel * Shape::PITCH * (i64)sizeof(T) + 15) / 16 * 16);
    A* stats = red + (3 + OMIT) * PARTS * R;
    const A p = factor_for<A>(N);
    const int r = threadIdx.x % LANES * PAIR;

    TileLook<Op, T, PAIR> look;
    TileRuns<PAIR, A> runs;
    i64 first;
    do {
        runs.clear();
        for (first = 0; first < N; first += panel) {
            const int cols = at_most(N - first, (int)panel);
            if (first) __syncthreads();  // before the tile of the panel before is overwritten
            if (N > panel || look.first) {
                get(first, cols);
                __syncthreads();
            }
            add_panel<Op, THREADS, R, OMIT>(tile, rows, cols, p, red, look, runs);
        }
    } while (take_stats<Op, R>(look, runs, r, threadIdx.x < LANES, p, N, eps, stats));
    RowStats<A> mine[PAIR];
#pragma unroll
    for (int i = 0; i < PAIR; ++i) {
        mine[i] = stats_of<R>(stats, r + i);
        if (threadIdx.x < LANES && r + i < rows) tell(r + i, mine[i]);
    }
    while ((first -= panel) >= 0) {
        const int cols = at_most(N - first, (int)panel);
        if (first + panel < N) {
            __syncthreads();
            get(first, cols);
            __syncthreads();
        }
        if (OUT_ROWS)
            store_along_rows<Op, THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, to(first), y_col, weight, bias, first, rows, cols, mine);
        else
            store_along_columns<Op, THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, to(first), y_row, y_col, weight, bias, first, rows, cols, stats);
    }
}
