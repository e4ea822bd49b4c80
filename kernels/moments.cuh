// Mean and variance of a row: the corrected two-pass algorithm (Chan, Golub, LeVeque 1983) on data
// that is on chip, and the merge of chunks by (count, mean, M2) (Chan, Golub, LeVeque 1979).
//
//     s  = sum(x) / n               rounded, so off by a few ulp of the mean
//     d  = x - s
//     m' = sum(d) / n               what s lacks
//     M2 = sum(d * d) - n * m'^2
//
// Without m' a row of values near 1e6 would lose five of its seven digits. M2 is kept times
// q = 2^-ceil(log2 N), an exact factor, so that the sum of squares of 1e18 does not overflow.

// Mean = hi + lo with lo far below an ulp of hi; m2q = q * sum((x - mean)^2).
template <class A>
struct Moments {
    A hi, lo, m2q;
};

// What normalizes a row: y = (x - mean) * rstd + shift, shift = -(low part of the mean) * rstd.
template <class A>
struct RowStats {
    A mean, rstd, shift;
};

template <class A>
__device__ __forceinline__ A scale_for(i64 N) {
    A q;
    power_of_two(q, -ceil_log2(N));
    return q;
}

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

// Sums of d = x - s and of q * d^2 over the first `n` columns of a segment. Columns past n hold
// zeros, and zero minus s is not zero: they are left out here, or the variance would be wrong.
template <int LANES, class T, class A, int VECS>
__device__ __forceinline__ void lane_deviations(const Vec (&v)[VECS], A s, A q, int n, int lane, A& sum, A& squares) {
    constexpr int V = PerVec<T>::count;
    sum = 0;
    squares = 0;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        A t[V];
        unpack(unseen(v[k]), t, (const T*)0);
        const int left = n - (k * LANES + lane) * V;
        if (left >= V) {
#pragma unroll
            for (int i = 0; i < V; ++i) t[i] -= s;
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) t[i] = i < left ? t[i] - s : (A)0;
        }
        sum += tree_sum(t);
#pragma unroll
        for (int i = 0; i < V; ++i) squares = multiply_add(t[i] * q, t[i], squares);
    }
}

// `sum` and `squares` are those of the deviations from s, over n elements.
template <class A>
__device__ __forceinline__ Moments<A> corrected(A s, A sum, A squares, A q, A n) {
    const A lack = sum / n;
    const A m2q = multiply_add(-(sum * q), lack, squares);
    // Rounding may leave a hair below zero; NaN must pass.
    return Moments<A>{s, lack, m2q < 0 ? (A)0 : m2q};
}

// hi + lo with hi the rounded sum.
template <class A>
__device__ __forceinline__ void renormalize(A& hi, A& lo) {
    const A sum = hi + lo;
    const A part = sum - hi;
    lo = (hi - (sum - part)) + (lo - part);
    hi = sum;
}

template <class A>
__device__ __forceinline__ RowStats<A> row_stats(Moments<A> m, A q, i64 N, double eps) {
    renormalize(m.hi, m.lo);
    const A variance = m.m2q / ((A)N * q);
    const A rstd = (A)1 / square_root(variance + (A)eps);
    return RowStats<A>{m.hi, rstd, -m.lo * rstd};
}

// A run of elements whose mean is given relative to a shift common to the row, so that merging means
// that share a large offset loses nothing.
template <class A>
struct Run {
    A count, mean, m2q;
};

// An empty run changes no bit of the other.
template <class A>
__device__ __forceinline__ Run<A> merge(const Run<A>& a, const Run<A>& b, A q) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const A count = a.count + b.count;
    const A share = b.count / count;
    const A delta = b.mean - a.mean;
    const A between = multiply_add(delta * q, delta * (a.count * share), b.m2q);
    return Run<A>{count, multiply_add(delta, share, a.mean), a.m2q + between};
}

// Merges the runs of the 32 lanes in a fixed tree; every lane gets the result.
template <class A>
__device__ __forceinline__ Run<A> warp_merge(Run<A> run, A q) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        Run<A> other;
        other.count = __shfl_down_sync(0xffffffffu, run.count, step, 32);
        other.mean = __shfl_down_sync(0xffffffffu, run.mean, step, 32);
        other.m2q = __shfl_down_sync(0xffffffffu, run.m2q, step, 32);
        run = merge(run, other, q);
    }
    run.count = __shfl_sync(0xffffffffu, run.count, 0, 32);
    run.mean = __shfl_sync(0xffffffffu, run.mean, 0, 32);
    run.m2q = __shfl_sync(0xffffffffu, run.m2q, 0, 32);
    return run;
}
