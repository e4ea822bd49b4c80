// Mean and variance of a row: the corrected two-pass algorithm (Chan, Golub, LeVeque 1983) on data
// that is on chip, and the merge of chunks by (count, mean, M2) (Chan, Golub, LeVeque 1979).
//
//     s  = sum(x) / n               rounded, so off by a few ulp of the mean
//     d  = x - s
//     m' = sum(d) / n               what s lacks
//     M2 = sum(d * d) - n * m'^2
//
// Without m' a row of values near 1e6 would lose five of its seven digits. Deviations are taken times
// p = 2^-k with p * p * N <= 1, an exact factor, so that the sum of squares of 1e18 does not overflow.
// Without a centre s and m' are zero.
//
// A row whose variance has left the range all the same, or would flush to zero beside eps, is looked at
// again as x * scale, a power of two: first for its mean, then for its variance (`Look`).

// ---- sums, always in one fixed order -----------------------------------------------------------------

// Over the lanes of a warp. Every lane gets the same bits: in each step both partners add the same two
// numbers.
template <int LANES, class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step, LANES);
    return value;
}

template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[1]) {
    return t[0];
}
template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[2]) {
    return t[0] + t[1];
}
template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[4]) {
    return (t[0] + t[1]) + (t[2] + t[3]);
}
template <class A>
__device__ __forceinline__ A tree_sum(const A (&t)[8]) {
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

// What COUNT warps have left in shared memory, in warp order.
template <int COUNT, class A>
__device__ __forceinline__ A ordered_sum(const A* partial) {
    A total = partial[0];
#pragma unroll
    for (int w = 1; w < COUNT; ++w) total += partial[w];
    return total;
}

// ---- moments -----------------------------------------------------------------------------------------

// Of x * scale. Mean = hi + lo with lo far below an ulp of hi; m2 = sum((p * (x * scale - mean))^2).
template <class A>
struct Moments {
    A hi, lo, m2;
};

// What normalizes a row: x_hat = (x * scale - mean) * rstd + shift, shift = -(low part of the mean) * rstd.
template <class A>
struct RowStats {
    A mean, rstd, shift, scale;
};

template <class A>
__device__ __forceinline__ A factor_for(i64 N) {
    A p;
    power_of_two(p, -(ceil_log2(N) + 1) / 2);
    return p;
}

// Where m2 may lie, by the type of x: within 2^HIGH, and from N * 2^LOW on no square that counts has
// been flushed. Beyond, x is scaled by 2^DOWN or 2^UP, which bring every x that there is back between.
template <class X>
struct Range {
    static constexpr bool everywhere = false;
    static constexpr int HIGH = 120, LOW = -98, DOWN = -70, UP = 88;
};
template <>
struct Range<f16> : Range<float> {
    static constexpr bool everywhere = true;  // no float16 is so large or so small
};
template <>
struct Range<double> {
    static constexpr bool everywhere = false;
    static constexpr int HIGH = 1000, LOW = -940, DOWN = -530, UP = 900;
};

// How a row is looked at.
template <class Op, class X>
struct Look {
    typedef typename Accumulator<X>::type A;
    A scale, mean;  // `mean`, of x * scale, is what deviations are told from where `again`
    int turn;

    __device__ __forceinline__ Look() : scale(1), mean(0), turn(0) {}

    // Whether deviations are told from `mean`, not from the mean of the values at hand.
    __device__ __forceinline__ bool again() const { return !Op::center || turn; }

    // Whether the row must be looked at once more than has given these moments, and how.
    __device__ __forceinline__ bool next(A hi, A lo, A m2, i64 N, double eps) {
        if (Range<X>::everywhere || turn == Op::looks) return false;
        if (turn) {
            mean = hi + lo;
            if (mean != mean) return false;
        } else {
            A least, most;
            power_of_two(least, Range<X>::LOW);
            power_of_two(most, Range<X>::HIGH);
            const bool small = m2 + (A)fabs(eps) < least * (A)N;
            if (!small && m2 <= most) {  // NaN is looked at again, and stays
                turn = Op::looks;
                return false;
            }
            power_of_two(scale, small ? Range<X>::UP : Range<X>::DOWN);
            mean = 0;
        }
        ++turn;
        return true;
    }
};

// Sum of the elements a lane holds; elements past the segment's end were loaded as zero.
template <class T, class A, int VECS>
__device__ __forceinline__ A lane_sum(const Vec (&v)[VECS]) {
    A total = 0;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        A t[PerVec<T>::count];
        unpack(v[k], t, (const T*)0);
        total += tree_sum(t);
    }
    return total;
}

// Sums of e = p * (x * scale - s) and of e^2 over the first `n` columns of a segment. Columns past n hold
// zeros, and zero minus s is not zero: they are left out here, or the variance would be wrong.
template <class Op, bool ALIGNED, int LANES, class T, class A, int VECS>
__device__ __forceinline__ void lane_deviations(
    const Vec (&v)[VECS], A s, A scale, A p, int n, int lane, A& sum, A& squares) {
    constexpr int V = PerVec<T>::count;
    const A factor = Range<T>::everywhere ? p : p * scale, off = -s * p;
    sum = 0;
    squares = 0;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        A t[V];
        unpack(unseen(v[k]), t, (const T*)0);
        const int left = n - (k * LANES + lane) * V;
        if (ALIGNED || left >= V || !Op::center) {
#pragma unroll
            for (int i = 0; i < V; ++i)
                t[i] = !Op::center ? t[i] * factor : left > 0 ? multiply_add(t[i], factor, off) : (A)0;
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) t[i] = i < left ? multiply_add(t[i], factor, off) : (A)0;
        }
        if (Op::center) sum += tree_sum(t);
#pragma unroll
        for (int i = 0; i < V; ++i) squares = multiply_add(t[i], t[i], squares);
    }
}

// `sum` and `squares` are those of the deviations from s, over n elements.
template <class Op, class A>
__device__ __forceinline__ Moments<A> corrected(A s, A sum, A squares, A p, A n) {
    if (!Op::center) return Moments<A>{0, 0, squares};
    const A lack = sum / n;
    const A m2 = multiply_add(-sum, lack, squares);
    // Rounding may leave a hair below zero; NaN must pass.
    return Moments<A>{s, product(lack, inverse_of(p)), m2 < 0 ? (A)0 : m2};
}

// hi + lo with hi the rounded sum.
template <class A>
__device__ __forceinline__ void renormalize(A& hi, A& lo) {
    const A sum = hi + lo;
    const A part = sum - hi;
    lo = (hi - (sum - part)) + (lo - part);
    hi = sum;
}

// Of a row of `count` elements that was looked at as x * scale.
template <class A>
__device__ __forceinline__ RowStats<A> row_stats(Moments<A> m, A p, A scale, A count, double eps) {
    renormalize(m.hi, m.lo);
    const A variance = m.m2 / (count * (p * p));
    const A rstd = (A)1 / square_root(variance + product(product((A)eps, scale), scale));
    return RowStats<A>{m.hi, rstd, -m.lo * rstd, scale};
}

template <class Op, class X, class A>
__device__ __forceinline__ A normalized(A x, const RowStats<A>& s) {
    if (!Range<X>::everywhere && !Op::center) x = product(x, s.scale);
    if (!Op::center) return product(x, s.rstd);
    const A deviation = Range<X>::everywhere ? x - s.mean : multiply_add(x, s.scale, -s.mean);
    return multiply_add(deviation, s.rstd, s.shift);
}

// In x's own units.
template <class A>
__device__ __forceinline__ void store_stats(A* mean, A* rstd, i64 row, const RowStats<A>& stats) {
    if (mean) mean[row] = stats.mean * inverse_of(stats.scale);
    if (rstd) rstd[row] = stats.rstd * stats.scale;
}

// A run of elements whose mean is given relative to a shift common to the row, so that merging means
// that share a large offset loses nothing.
template <class A>
struct Run {
    A count, mean, m2;
};

template <class A>
__device__ __forceinline__ Run<A> run_of(const Moments<A>& m, A count, A shift) {
    return Run<A>{count, (m.hi - shift) + m.lo, m.m2};
}

// An empty run changes no bit of the other.
template <class A>
__device__ __forceinline__ Run<A> merge(const Run<A>& a, const Run<A>& b, A p) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const A count = a.count + b.count;
    const A share = b.count / count;
    const A delta = b.mean - a.mean, scaled = delta * p;
    const A between = multiply_add(scaled, scaled * (a.count * share), b.m2);
    return Run<A>{count, multiply_add(delta, share, a.mean), a.m2 + between};
}

// Merges the runs of the 32 lanes in a fixed tree; every lane gets the result.
template <class A>
__device__ __forceinline__ Run<A> warp_merge(Run<A> run, A p) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        Run<A> other;
        other.count = __shfl_down_sync(0xffffffffu, run.count, step, 32);
        other.mean = __shfl_down_sync(0xffffffffu, run.mean, step, 32);
        other.m2 = __shfl_down_sync(0xffffffffu, run.m2, step, 32);
        run = merge(run, other, p);
    }
    run.count = __shfl_sync(0xffffffffu, run.count, 0, 32);
    run.mean = __shfl_sync(0xffffffffu, run.mean, 0, 32);
    run.m2 = __shfl_sync(0xffffffffu, run.m2, 0, 32);
    return run;
}

// ---- chunks ------------------------------------------------------------------------------------------
// 16 KiB of a row, the unit of the statistics of K3, K4 and K5.
//
// A chunk is always held by 256 threads, 4 vectors each, so its mean and M2 have the same bits in
// whichever kernel computes them; runs of chunks are always merged in the same tree. That is why the
// split-row kernel may be chosen by the number of rows without changing a bit of the result.

enum {
    CHUNK_WARPS = 8,
    CHUNK_THREADS = 32 * CHUNK_WARPS,
    CHUNK_VECS = 4,  // per thread
    // Words of one chunk's partial sums: an odd number, so that lanes which read the sums of
    // neighbouring chunks (K3's merge) meet different banks.
    CHUNK_PARTIALS = 3 * CHUNK_WARPS + 1,
};

template <class T>
struct Chunk {
    static constexpr int warp_cols = 32 * CHUNK_VECS * PerVec<T>::count;
    static constexpr int cols = CHUNK_WARPS * warp_cols;
};

// What the deviations of a chunk of n columns are told from; its partial sums are in shared memory:
// A partial[3][CHUNK_WARPS].
template <class Op, class X, class A>
__device__ __forceinline__ A chunk_pivot(const Look<Op, X>& look, const A* partial, int n) {
    return look.again() ? look.mean : ordered_sum<CHUNK_WARPS>(partial) / (A)n;
}

// A warp's part of the sums of a chunk's deviations; its other part may hold none of the columns.
template <class Op, bool ALIGNED, class X, class A>
__device__ __forceinline__ void put_deviations(
    A* partial, const Segment<32, CHUNK_VECS>& s, const Look<Op, X>& look, A p, int count, int n, int warp, int lane) {
    A sum, squares;
    lane_deviations<Op, ALIGNED, 32, X>(
        s.v, chunk_pivot(look, partial, count), look.scale, p, n, lane, sum, squares);
    if (Op::center) sum = warp_sum<32>(sum);
    squares = warp_sum<32>(squares);
    if (lane) return;
    partial[CHUNK_WARPS + warp] = sum;
    partial[2 * CHUNK_WARPS + warp] = squares;
}

template <class Op, class X, class A>
__device__ __forceinline__ Moments<A> chunk_moments(const Look<Op, X>& look, const A* partial, int n, A p) {
    const A sum = ordered_sum<CHUNK_WARPS>(partial + CHUNK_WARPS);
    const A squares = ordered_sum<CHUNK_WARPS>(partial + 2 * CHUNK_WARPS);
    return corrected<Op>(chunk_pivot(look, partial, n), sum, squares, p, (A)n);
}
