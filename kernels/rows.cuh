// What the row kernels share: where a row lies, and the step from statistics to y.

// The arguments of every row kernel, in the order of its entry.
template <class X, class W, class B>
struct RowArguments {
    typedef typename Accumulator<X>::type A;
    const X* x;       // rows of N columns, unit stride inside a row
    X* y;             // the same; may be x
    const W* weight;  // (N,) or null
    const B* bias;    // (N,) or null
    A* mean;          // (rows,) or null
    A* rstd;          // (rows,) or null
    i64 rows;         // outer * M
    i64 M;
    i64 x_outer, x_row, y_outer, y_row;  // element strides
    i64 N;
    double eps;
};

// One 64-bit offset per row; everything inside a row is 32-bit.
__device__ __forceinline__ i64 row_offset(i64 row, i64 rows, i64 M, i64 outer_stride, i64 row_stride) {
    if (M == rows) return row * row_stride;
    const i64 outer = row / M;
    return outer * outer_stride + (row - outer * M) * row_stride;
}

__device__ __forceinline__ int at_most(i64 n, int limit) {
    return n < 0 ? 0 : n < limit ? (int)n : limit;
}

// Elements [col, col + V) of weight or bias in the accumulator's type, in the widest aligned loads.
template <int V, class W, class A>
__device__ __forceinline__ void load_affine(const W* __restrict__ p, i64 col, int left, A (&out)[V]) {
    constexpr int BYTES = V * (int)sizeof(W);
    constexpr int WIDTH = BYTES < 16 ? BYTES : 16;
    p += col;
    if (left >= V && ((u64)p & (WIDTH - 1)) == 0) {
        struct alignas(WIDTH) Wide {
            W e[WIDTH / sizeof(W)];
        };
#pragma unroll
        for (int j = 0; j < BYTES / WIDTH; ++j) {
            const Wide wide = ((const Wide*)p)[j];
#pragma unroll
            for (int i = 0; i < WIDTH / (int)sizeof(W); ++i)
                out[j * (WIDTH / (int)sizeof(W)) + i] = (A)to_float(wide.e[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = i < left ? (A)to_float(p[i]) : (A)0;
    }
}

// Turns the columns of `v` from x into y. `col` is the vector's first column, `left` the number of
// its columns that exist.
template <class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, int ROWS, class A>
__device__ __forceinline__ void normalize(
    Vec* const (&v)[ROWS], const RowStats<A> (&stats)[ROWS], const W* weight, const B* bias, i64 col, int left) {
    constexpr int V = PerVec<X>::count;
    A w[V], b[V];
    if (HAS_WEIGHT) load_affine(weight, col, left, w);
    if (HAS_BIAS) load_affine(bias, col, left, b);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        A t[V];
        unpack(unseen(*v[r]), t, (const X*)0);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            t[i] = multiply_add(t[i] - stats[r].mean, stats[r].rstd, stats[r].shift);
            if (HAS_WEIGHT && HAS_BIAS)
                t[i] = multiply_add(t[i], w[i], b[i]);
            else if (HAS_WEIGHT)
                t[i] = t[i] * w[i];
            else if (HAS_BIAS)
                t[i] = t[i] + b[i];
        }
        pack(*v[r], t, (const X*)0);
    }
}

template <int LANES, int VECS, class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, int ROWS, class A>
__device__ __forceinline__ void normalize_segments(
    Segment<LANES, VECS> (&s)[ROWS], const RowStats<A> (&stats)[ROWS], const W* weight, const B* bias,
    i64 first, int n, int lane) {
    constexpr int V = PerVec<X>::count;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int col = (k * LANES + lane) * V;
        if (col >= n) break;
        Vec* v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) v[r] = &s[r].v[k];
        normalize<X, W, B, HAS_WEIGHT, HAS_BIAS>(v, stats, weight, bias, first + col, n - col);
    }
}

// Writes a segment of columns to p. Every lane of the warp must come here.
template <int LANES, int VECS, class T>
__device__ __forceinline__ void store_columns(Segment<LANES, VECS>& s, T* p, int n, int lane) {
    columns_to_granules<LANES, VECS, T>(s, n ? skew_of(p) : 0, lane);
    // In place, a lane may write the edge that another one has read; shuffles order no memory.
    __syncwarp(0xffffffffu);
    store_granules(s, p, n, lane);
}

template <class A>
__device__ __forceinline__ void store_stats(A* mean, A* rstd, i64 row, const RowStats<A>& stats) {
    if (mean) {
        mean[row] = stats.mean;
        rstd[row] = stats.rstd;
    }
}
