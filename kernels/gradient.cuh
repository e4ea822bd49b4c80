// What the backward kernels share: a row of x and dy on chip, its three sums, dx, and the sums over
// rows that become dweight and dbias.
//
//     h = (x - mean) * rstd     l = sum(h) / N         what the rounded mean lacks, times rstd
//     g = dy * weight           x_hat = h - l
//     c1 = sum(g) / N           c2 = sum(g * x_hat) / N = (sum(g * h) - l * sum(g)) / N
//     dx = rstd * (g - c1 - x_hat * c2)         rounded; dsum, if there is one, is added to that
//     dweight = sum over rows of dy * x_hat            dbias = sum over rows of dy
//
// Without a centre mean, l and c1 are zero. With `unit_weight` g = dy * (1 + weight). The three sums of a
// row need one exchange. Without l a row of values near 1e6 would lose most of its digits, here as in the
// forward.

// The arguments of every backward kernel that writes dx, in the order of its entry.
template <class X, class W>
struct GradientArguments {
    typedef typename Accumulator<X>::type A;
    const X* dy;      // rows of N columns, unit stride inside a row
    const X* x;       // the same
    const A* mean;    // (rows,), or null without a centre
    const A* rstd;    // (rows,)
    const W* weight;  // (N,) or null
    X* dx;            // as x, or null
    A* partials;      // [dweight, dbias][count][pitch]: what each block has added up
    i64 rows;         // outer * M
    i64 M;
    i64 dy_outer, dy_row, x_outer, x_row, dx_outer, dx_row;  // element strides
    i64 N;
    // Of an operation with a residual alone.
    const X* dsum;
    i64 dsum_outer, dsum_row;
};

// Columns of one row of partials: whole vectors, so that each is stored in 16-byte pieces.
template <class X>
__device__ __forceinline__ i64 pitch_of(i64 N) {
    constexpr int V = PerVec<X>::count;
    return (N + V - 1) / V * V;
}

// The columns [first, first + n) of one row of x and dy, as a group of lanes holds them.
template <int LANES, int VECS, class A>
struct GradientRow {
    Segment<LANES, VECS> x, dy;
    A mean, rstd;
};

// Issues the loads alone: what they bring is first looked at in `to_columns`.
template <class Op, bool ALIGNED, int LANES, int VECS, class X, class W, class A>
__device__ __forceinline__ void fetch(
    GradientRow<LANES, VECS, A>& r, const GradientArguments<X, W>& a, i64 row, i64 first, int n, int lane) {
    const bool live = row < a.rows;
    if (!live) n = 0;
    load_granules<ALIGNED>(r.x, row_at(a.x, a, a.x_outer, a.x_row, row, first, n), n, lane);
    load_granules<ALIGNED>(r.dy, row_at(a.dy, a, a.dy_outer, a.dy_row, row, first, n), n, lane);
    r.mean = Op::center && live ? a.mean[row] : (A)0;
    r.rstd = live ? a.rstd[row] : (A)0;
}

template <bool ALIGNED, class X, int LANES, int VECS, class A>
__device__ __forceinline__ void to_columns(GradientRow<LANES, VECS, A>& r, int n, int lane) {
    granules_to_columns<ALIGNED, X>(r.x, n, lane);
    granules_to_columns<ALIGNED, X>(r.dy, n, lane);
}

// sum(h), sum(g), sum(g * h).
template <class A>
struct GradientSums {
    A h, g, gh;
};

template <class Op, int LANES, class A>
__device__ __forceinline__ GradientSums<A> warp_sum(const GradientSums<A>& s) {
    if (!Op::center) return GradientSums<A>{0, 0, warp_sum<LANES>(s.gh)};
    return GradientSums<A>{warp_sum<LANES>(s.h), warp_sum<LANES>(s.g), warp_sum<LANES>(s.gh)};
}

// A warp's sums to A sums[3][WARPS] of shared memory.
template <int WARPS, class A>
__device__ __forceinline__ void put_sums(A* sums, const GradientSums<A>& s, int warp, int lane) {
    if (lane) return;
    sums[warp] = s.h;
    sums[WARPS + warp] = s.g;
    sums[2 * WARPS + warp] = s.gh;
}

// What WARPS warps have left there: every group of WARPS lanes adds it in the same tree.
template <class Op, int WARPS, class A>
__device__ __forceinline__ GradientSums<A> sums_of_warps(const A* sums, int lane) {
    const A* from = sums + lane % WARPS;
    return warp_sum<Op, WARPS>(GradientSums<A>{from[0], from[WARPS], from[2 * WARPS]});
}

// The sums over a block, through A sums[3][WARPS]: written before one barrier, read after it.
template <class Op, int WARPS, class A>
__device__ __forceinline__ GradientSums<A> block_sums(A* sums, const GradientSums<A>& mine, int warp, int lane) {
    put_sums<WARPS>(sums, warp_sum<Op, 32>(mine), warp, lane);
    __syncthreads();
    return sums_of_warps<Op, WARPS>(sums, lane);
}

// h and g of vector k, s is dy. dy is zero past the row's end, x - mean is not: it is left out.
template <class Op, bool HAS_WEIGHT, bool ALIGNED, class X, int LANES, int VECS, class A, class Weight, int V>
__device__ __forceinline__ void unpack_row(
    const GradientRow<LANES, VECS, A>& r, int k, int left, const Weight& weight, A (&h)[V], A (&s)[V], A (&g)[V]) {
    A w[V];
    if (HAS_WEIGHT) weight.get(k, w);
    unpack(unseen(r.x.v[k]), h, (const X*)0);
    unpack(unseen(r.dy.v[k]), s, (const X*)0);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        h[i] = !Op::center ? product(h[i], r.rstd) : (ALIGNED ? left > 0 : i < left) ? product(h[i] - r.mean, r.rstd) : (A)0;
        g[i] = HAS_WEIGHT ? product(s[i], weight_of<Op>(w[i])) : s[i];
    }
}

// The sums over the n columns that a lane holds.
template <class Op, bool HAS_WEIGHT, bool ALIGNED, class X, int LANES, int VECS, class A, class Weight>
__device__ __forceinline__ GradientSums<A> lane_sums(
    const GradientRow<LANES, VECS, A>& r, const Weight& weight, int n, int lane) {
    constexpr int V = PerVec<X>::count;
    GradientSums<A> sums = {0, 0, 0};
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int col = (k * LANES + lane) * V;
        if (col >= n) break;
        A h[V], s[V], g[V];
        unpack_row<Op, HAS_WEIGHT, ALIGNED, X>(r, k, n - col, weight, h, s, g);
        if (Op::center) {
            sums.h += tree_sum(h);
            sums.g += tree_sum(g);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) h[i] = product(h[i], g[i]);
        sums.gh += tree_sum(h);
    }
    return sums;
}

// What a row's sums come to.
template <class A>
struct RowGradient {
    A lack, c1, c2;
};

template <class Op, class A>
__device__ __forceinline__ RowGradient<A> row_gradient(const GradientSums<A>& s, i64 N) {
    if (!Op::center) return RowGradient<A>{0, 0, s.gh / (A)N};
    const A lack = s.h / (A)N;
    return RowGradient<A>{lack, s.g / (A)N, multiply_add(-lack, s.g, s.gh) / (A)N};
}

// dweight and dbias of the columns that a thread holds, in its registers.
template <int VECS, class A, int V>
struct RegisterTotals {
    A dweight[VECS][V], dbias[VECS][V];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
#pragma unroll
            for (int i = 0; i < V; ++i) dweight[k][i] = dbias[k][i] = 0;
        }
    }
    template <bool DWEIGHT, bool DBIAS>
    __device__ __forceinline__ void add(int k, const A (&s)[V], const A (&x_hat)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (DWEIGHT) dweight[k][i] = multiply_add(s[i], x_hat[i], dweight[k][i]);
            if (DBIAS) dbias[k][i] += s[i];
        }
    }
};

// Adds the row to `totals` and turns r.x into dx.
template <class Op, bool DX, bool DWEIGHT, bool DBIAS, bool HAS_WEIGHT, bool ALIGNED, class X, int LANES, int VECS, class A, class Weight, class Totals>
__device__ __forceinline__ void differentiate(
    GradientRow<LANES, VECS, A>& r, const RowGradient<A>& c, const Weight& weight, int n, int lane, Totals& totals) {
    constexpr int V = PerVec<X>::count;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int col = (k * LANES + lane) * V;
        if (col >= n) break;
        A h[V], s[V], g[V];
        unpack_row<Op, HAS_WEIGHT && DX, ALIGNED, X>(r, k, n - col, weight, h, s, g);
        if (Op::center) {
#pragma unroll
            for (int i = 0; i < V; ++i) h[i] -= c.lack;
        }
        totals.template add<DWEIGHT, DBIAS>(k, s, h);
        if constexpr (DX) {
#pragma unroll
            for (int i = 0; i < V; ++i) g[i] = r.rstd * multiply_add(-h[i], c.c2, Op::center ? g[i] - c.c1 : g[i]);
            pack(r.x.v[k], g, (const X*)0);
        }
    }
}

// What comes after the sums of a row: dx, and what it adds to dweight and dbias. Every lane of the warp must
// come here.
template <class Op, bool DX, bool DWEIGHT, bool DBIAS, bool HAS_WEIGHT, bool ALIGNED, int LANES, int VECS, class X, class W, class A, class Weight, class Totals>
__device__ __forceinline__ void finish_row(
    GradientRow<LANES, VECS, A>& r, const RowGradient<A>& c, const GradientArguments<X, W>& a, const Weight& weight,
    i64 row, i64 first, int n, int lane, Totals& totals) {
    differentiate<Op, DX, DWEIGHT, DBIAS, HAS_WEIGHT, ALIGNED, X>(r, c, weight, n, lane, totals);
    if constexpr (DX) {
        if (row >= a.rows) n = 0;
        if constexpr (Op::residual) {  // in the place of dy, or registers would not do
            load_granules<ALIGNED>(r.dy, row_at(a.dsum, a, a.dsum_outer, a.dsum_row, row, first, n), n, lane);
            granules_to_columns<ALIGNED, X>(r.dy, n, lane);
            add_vectors<X>(r.x, r.dy);
        }
        store_columns<ALIGNED>(r.x, row_at(a.dx, a, a.dx_outer, a.dx_row, row, first, n), n, lane);
    }
}

// ---- sums of V accumulators, in 16-byte pieces -----------------------------------------------------

template <class A, int V>
struct Pieces {
    static constexpr int count = V * (int)sizeof(A) / 16;
    struct alignas(16) Piece {
        A e[16 / sizeof(A)];
    };
};

// Piece p lies at p * step pieces of shared memory: lanes that are neighbours meet different banks.
template <class A, int V>
__device__ __forceinline__ typename Pieces<A, V>::Piece piece_of(const A (&v)[V], int p) {
    typename Pieces<A, V>::Piece piece;
#pragma unroll
    for (int i = 0; i < 16 / (int)sizeof(A); ++i) piece.e[i] = v[p * (16 / (int)sizeof(A)) + i];
    return piece;
}
template <class A, int V>
__device__ __forceinline__ void put_pieces(void* at, int step, const A (&v)[V]) {
#pragma unroll
    for (int p = 0; p < Pieces<A, V>::count; ++p) ((typename Pieces<A, V>::Piece*)at)[p * step] = piece_of(v, p);
}

// One after another in global memory.
template <class A, int V>
__device__ __forceinline__ void store_pieces(A* at, const A (&v)[V]) {
#pragma unroll
    for (int p = 0; p < Pieces<A, V>::count; ++p)
        store16_to_keep(at + p * (16 / (int)sizeof(A)), bit_cast<Vec>(piece_of(v, p)));
}

template <class A, int V>
__device__ __forceinline__ void get_pieces(const void* at, int step, A (&v)[V]) {
    typedef typename Pieces<A, V>::Piece Piece;
    constexpr int E = 16 / (int)sizeof(A);
#pragma unroll
    for (int p = 0; p < Pieces<A, V>::count; ++p) {
        const Piece piece = ((const Piece*)at)[p * step];
#pragma unroll
        for (int i = 0; i < E; ++i) v[p * E + i] = piece.e[i];
    }
}

// Where block `index` of `count` leaves its sums of dweight (which = 0) or dbias (which = 1, or 0 where
// dweight is not wanted).
template <class X, class A>
__device__ __forceinline__ A* partial_row(A* partials, i64 which, i64 index, i64 count, i64 N) {
    return partials + (which * count + index) * pitch_of<X>(N);
}

// Writes what one lane holds of a block's sums.
template <class X, bool DWEIGHT, bool DBIAS, int LANES, int VECS, class A, int V>
__device__ __forceinline__ void put_totals(
    A* partials, i64 index, i64 count, i64 N, const RegisterTotals<VECS, A, V>& totals, i64 first, int n, int lane) {
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int col = (k * LANES + lane) * V;
        if (col >= n) break;
        if (DWEIGHT) store_pieces(partial_row<X>(partials, 0, index, count, N) + first + col, totals.dweight[k]);
        if (DBIAS) store_pieces(partial_row<X>(partials, DWEIGHT, index, count, N) + first + col, totals.dbias[k]);
    }
}

// ---- dweight and dbias of a block's columns in shared memory -------------------------------------------
// A thread reads and writes only its own, so they need no barrier.
//
// Shared memory: Piece totals[dweight, dbias][VECS][pieces][THREADS] (those that are wanted).

template <int THREADS, class A, int V>
struct SharedTotals {
    unsigned char* mine;    // this thread's first piece of dweight, or of dbias where that is alone
    int dbias_at;           // bytes from there to dbias
    static constexpr int PER_VEC = Pieces<A, V>::count * THREADS * 16;  // bytes

    // Those of the vectors from `vec` on.
    __device__ __forceinline__ SharedTotals from(int vec) const {
        return SharedTotals{mine + vec * PER_VEC, dbias_at};
    }

    template <int VECS, bool DWEIGHT, bool DBIAS>
    __device__ __forceinline__ void clear() {
        const A zero[V] = {};
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
            if (DWEIGHT) put_pieces(mine + k * PER_VEC, THREADS, zero);
            if (DBIAS) put_pieces(mine + dbias_at + k * PER_VEC, THREADS, zero);
        }
    }

    template <bool DWEIGHT, bool DBIAS>
    __device__ __forceinline__ void add(int k, const A (&s)[V], const A (&x_hat)[V]) {
        A t[V];
        if (DWEIGHT) {
            unsigned char* at = mine + k * PER_VEC;
            get_pieces(at, THREADS, t);
#pragma unroll
            for (int i = 0; i < V; ++i) t[i] = multiply_add(s[i], x_hat[i], t[i]);
            put_pieces(at, THREADS, t);
        }
        if (DBIAS) {
            unsigned char* at = mine + dbias_at + k * PER_VEC;
            get_pieces(at, THREADS, t);
#pragma unroll
            for (int i = 0; i < V; ++i) t[i] += s[i];
            put_pieces(at, THREADS, t);
        }
    }

    // Leaves them as partial `index` of `count`.
    template <class X, int VECS, bool DWEIGHT, bool DBIAS>
    __device__ __forceinline__ void leave(A* partials, i64 index, i64 count, i64 N, i64 first, int n, int lane) const {
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
            const int col = (k * 32 + lane) * V;
            if (col >= n) break;
            A t[V];
            if (DWEIGHT) {
                get_pieces(mine + k * PER_VEC, THREADS, t);
                store_pieces(partial_row<X>(partials, 0, index, count, N) + first + col, t);
            }
            if (DBIAS) {
                get_pieces(mine + dbias_at + k * PER_VEC, THREADS, t);
                store_pieces(partial_row<X>(partials, DWEIGHT, index, count, N) + first + col, t);
            }
        }
    }
};
