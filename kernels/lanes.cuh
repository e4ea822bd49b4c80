// K6 for few columns where x and y both lie along the rows: a thread holds all columns of its rows in
// registers, so nothing is exchanged and nobody waits. The sums are those of a tile, class by class
// (tile.cuh), so a row has the same bits here and there.
//
// A warp reads 32 * ROWS neighbouring rows of a column: 256 bytes, in one access where every column is
// aligned to what a lane holds of it. Where not, lanes take narrower pieces that still lie side by side,
// which only changes whose rows are whose.

// ROWS rows of each of COLS columns, packed in words: 8 bytes a column.
template <int COLS, int ROWS, class X>
struct Held {
    static constexpr int WORDS = ROWS * (int)sizeof(X) / 4;
    u32 w[COLS][WORDS];
};

// Puts ROWS values in a column's words.
template <int ROWS>
__device__ __forceinline__ void put_held(u32* w, const float (&v)[ROWS], const float*) {
#pragma unroll
    for (int e = 0; e < ROWS; ++e) w[e] = bit_cast<u32>(v[e]);
}
template <int ROWS>
__device__ __forceinline__ void put_held(u32* w, const double (&v)[ROWS], const double*) {
#pragma unroll
    for (int e = 0; e < ROWS; ++e) {
        const u64 bits = bit_cast<u64>(v[e]);
        w[2 * e] = (u32)bits;
        w[2 * e + 1] = (u32)(bits >> 32);
    }
}
template <int ROWS>
__device__ __forceinline__ void put_held(u32* w, const float (&v)[ROWS], const f16*) {
#pragma unroll
    for (int e = 0; e < ROWS; e += 2) w[e / 2] = f16_pair(v[e], v[e + 1]);
}
template <int ROWS>
__device__ __forceinline__ void put_held(u32* w, const float (&v)[ROWS], const bf16*) {
#pragma unroll
    for (int e = 0; e < ROWS; e += 2) w[e / 2] = bf16_pair(v[e], v[e + 1]);
}

// ---- one piece of BYTES, which starts at byte `at` of a column's words --------------------------------

template <int BYTES>
__device__ __forceinline__ void load_held(u32* w, int at, const unsigned char* from) {
    if constexpr (BYTES == 8) {
        const u64 bits = *(const u64*)from;
        w[0] = (u32)bits;
        w[1] = (u32)(bits >> 32);
    } else if constexpr (BYTES == 4) {
        w[at / 4] = *(const u32*)from;
    } else {
        w[at / 4] |= (u32) * (const u16*)from << 8 * (at % 4);
    }
}
template <int BYTES>
__device__ __forceinline__ void store_held(const u32* w, int at, unsigned char* to) {
    if constexpr (BYTES == 8)
        *(u64*)to = (u64)w[0] | (u64)w[1] << 32;
    else if constexpr (BYTES == 4)
        *(u32*)to = w[at / 4];
    else
        *(u16*)to = (u16)(w[at / 4] >> 8 * (at % 4));
}

// Row of a warp that is row `e` of a lane, in pieces of E.
template <int E>
__device__ __forceinline__ int row_of_lane(int e, int lane) {
    return (e / E * 32 + lane) * E + e % E;
}

// ---- a warp's rows, in pieces of E; WHOLE: all of them exist --------------------------------------------

// The last columns of COLS may not exist: a plan gives the smallest COLS that is a multiple of 8.
template <int COLS>
__device__ __forceinline__ bool is_column(int n, int N) {
    return n <= COLS - TILE_CLASSES || n < N;
}

template <bool WHOLE, int E, int COLS, int ROWS, class X>
__device__ __forceinline__ void load_lanes(
    Held<COLS, ROWS, X>& held, const X* x, i64 col_stride, int rows, int N, int lane) {
    constexpr int SIZE = (int)sizeof(X);
    const unsigned char* from = (const unsigned char*)x + lane * (E * SIZE);
#pragma unroll
    for (int n = 0; n < COLS; ++n) {
#pragma unroll
        for (int i = 0; i < Held<COLS, ROWS, X>::WORDS; ++i) held.w[n][i] = 0;
        if (is_column<COLS>(n, N)) {
#pragma unroll
            for (int e = 0; e < ROWS; e += E)
                if (WHOLE || row_of_lane<E>(e, lane) < rows)
                    load_held<E * SIZE>(held.w[n], e * SIZE, from + e * 32 * SIZE);
        }
        from += col_stride * SIZE;
    }
}

// ---- statistics of the rows of a thread ---------------------------------------------------------------

// Where a row is looked at again its deviations are told from 0: seen, that would turn their fma into a
// product, which ptxas may fuse into their sum, or not.
__device__ __forceinline__ float opaque(float v) {
    asm volatile("" : "+f"(v));
    return v;
}
__device__ __forceinline__ double opaque(double v) {
    asm volatile("" : "+d"(v));
    return v;
}

template <class Op, int COLS, int ROWS, class X, class A>
__device__ __forceinline__ RowStats<A> held_stats(const Held<COLS, ROWS, X>& held, int e, int N, A p, double eps) {
    A s[TILE_CLASSES], sq[TILE_CLASSES];
    Look<Op, X> look;
    if (Op::center) {
#pragma unroll
        for (int j = 0; j < TILE_CLASSES; ++j) s[j] = 0;
#pragma unroll
        for (int n = 0; n < COLS; ++n)
            if (is_column<COLS>(n, N)) s[n % TILE_CLASSES] += element(held.w[n], e, (const X*)0);
        look.mean = tree_sum(s) / (A)N;
    }
    for (;;) {
        const A scale = look.scale, factor = Range<X>::everywhere ? p : p * scale, off = opaque(-look.mean * p);
#pragma unroll
        for (int j = 0; j < TILE_CLASSES; ++j) s[j] = sq[j] = 0;
#pragma unroll
        for (int n = 0; n < COLS; ++n) {
            if (!is_column<COLS>(n, N)) continue;
            const A x = element(held.w[n], e, (const X*)0);
            const A v = Op::center ? multiply_add(x, factor, off) : x * factor;
            if (Op::center) s[n % TILE_CLASSES] += v;
            sq[n % TILE_CLASSES] = multiply_add(v, v, sq[n % TILE_CLASSES]);
        }
        const Moments<A> m = corrected<Op>(look.mean, tree_sum(s), tree_sum(sq), p, (A)N);
        if (!look.next(m.hi, m.lo, m.m2, N, eps))
            return tile_stats<Op>(run_of(m, (A)N, m.hi), m.hi, p, scale, eps);
    }
}

// Normalizes what is held and writes it. Weight and bias of eight columns are asked for before the first
// of them is written: of all at once, and they would take the registers that hold x.
template <class Op, bool WHOLE, int E, bool HAS_WEIGHT, bool HAS_BIAS, int COLS, int ROWS, class X, class W, class B, class A>
__device__ __forceinline__ void store_lanes(
    const Held<COLS, ROWS, X>& held, X* y, i64 col_stride, const W* weight, const B* bias,
    const RowStats<A> (&stats)[ROWS], int rows, int N, int lane) {
    constexpr int SIZE = (int)sizeof(X), GROUP = TILE_CLASSES;
    unsigned char* to = (unsigned char*)y + lane * (E * SIZE);
#pragma unroll
    for (int first = 0; first < COLS; first += GROUP) {
        A w[GROUP], b[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const bool here = is_column<COLS>(first + j, N);
            w[j] = HAS_WEIGHT && here ? weight_of<Op>((A)to_float(weight[first + j])) : (A)0;
            b[j] = HAS_BIAS && here ? (A)to_float(bias[first + j]) : (A)0;
        }
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            if (!is_column<COLS>(first + j, N)) break;
            A t[ROWS];
#pragma unroll
            for (int e = 0; e < ROWS; ++e) {
                t[e] = normalized<Op, X>(element(held.w[first + j], e, (const X*)0), stats[e]);
                t[e] = affine<HAS_WEIGHT, HAS_BIAS>(t[e], w[j], b[j]);
            }
            u32 out[Held<COLS, ROWS, X>::WORDS];
            put_held(out, t, (const X*)0);
#pragma unroll
            for (int e = 0; e < ROWS; e += E)
                if (WHOLE || row_of_lane<E>(e, lane) < rows) store_held<E * SIZE>(out, e * SIZE, to + e * 32 * SIZE);
            to += col_stride * SIZE;
        }
    }
}

template <class Op, bool WHOLE, int E, int COLS, int ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void normalize_lanes(
    const ColumnArguments<X, W, B>& a, i64 outer, i64 m, int rows, int lane) {
    typedef typename Accumulator<X>::type A;
    const int N = (int)a.N;
    const A p = factor_for<A>(a.N);
    Held<COLS, ROWS, X> held;
    load_lanes<WHOLE, E>(held, a.x + outer * a.x_outer + m, a.x_col, rows, N, lane);
    RowStats<A> stats[ROWS];
#pragma unroll
    for (int e = 0; e < ROWS; ++e) {
        stats[e] = held_stats<Op>(held, e, N, p, a.eps);
        const int r = row_of_lane<E>(e, lane);
        if (WHOLE || r < rows) store_stats(a.mean, a.rstd, outer * a.stats_outer + (m + r) * a.stats_row, stats[e]);
    }
    store_lanes<Op, WHOLE, E, HAS_WEIGHT, HAS_BIAS>(
        held, a.y + outer * a.y_outer + m, a.y_col, a.weight, a.bias, stats, rows, N, lane);
}

// Whether every column of a warp's rows starts on a boundary of what a lane takes in a piece of E.
template <int E, class X, class W, class B>
__device__ __forceinline__ bool takes_pieces(const ColumnArguments<X, W, B>& a) {
    constexpr u64 BYTES = E * sizeof(X);
    const u64 steps = (u64)a.x_outer | (u64)a.y_outer | (u64)a.x_col | (u64)a.y_col;
    return (((u64)a.x | (u64)a.y | steps * sizeof(X)) & (BYTES - 1)) == 0;
}

template <class Op, int THREADS, int COLS, int ROWS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_lanes(const ColumnArguments<X, W, B>& a) {
    const i64 groups = (a.M + THREADS * ROWS - 1) / (THREADS * ROWS);
    const i64 outer = blockIdx.x / groups;
    const i64 m = (blockIdx.x - outer * groups) * (THREADS * ROWS) + (threadIdx.x & ~31u) * ROWS;
    const int rows = at_most(a.M - m, 32 * ROWS), lane = threadIdx.x % 32;
    if (rows == 32 * ROWS && takes_pieces<ROWS>(a))
        normalize_lanes<Op, true, ROWS, COLS, ROWS, X, W, B, HAS_WEIGHT, HAS_BIAS>(a, outer, m, rows, lane);
    else if (rows > 0)
        normalize_lanes<Op, false, 1, COLS, ROWS, X, W, B, HAS_WEIGHT, HAS_BIAS>(a, outer, m, rows, lane);
}
