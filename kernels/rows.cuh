// What the row kernels share: where a row lies, weight and bias, the step from statistics to y.

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
    // Of an operation with a residual alone: as x; `sum` may be x or residual, and so may y.
    const X* residual;
    X* sum;
    i64 residual_outer, residual_row, sum_outer, sum_row;
};

// One 64-bit offset per row; everything inside a row is 32-bit.
__device__ __forceinline__ i64 row_offset(i64 row, i64 rows, i64 M, i64 outer_stride, i64 row_stride) {
    if (M == rows) return row * row_stride;
    const i64 outer = row / M;
    return outer * outer_stride + (row - outer * M) * row_stride;
}

// Where n columns of a row begin, from `first` on; anywhere if there are none.
template <class T, class Arguments>
__device__ __forceinline__ T* row_at(
    T* p, const Arguments& a, i64 outer_stride, i64 row_stride, i64 row, i64 first, int n) {
    return n ? p + row_offset(row, a.rows, a.M, outer_stride, row_stride) + first : p;
}

__device__ __forceinline__ int at_most(i64 n, int limit) {
    return n < 0 ? 0 : n < limit ? (int)n : limit;
}

// ---- weight and bias ---------------------------------------------------------------------------------

template <int BYTES>
struct alignas(BYTES < 16 ? BYTES : 16) Words {
    u32 w[BYTES / 4];
};

// Weight or bias of the columns of a segment. HELD: they are loaded at once, and stay in registers as they
// lie in memory; else each vector's when it is asked for.
template <bool HAS, bool HELD, bool ALIGNED, int LANES, int VECS, int V, class W>
struct Affine {
    typedef Words<V * (int)sizeof(W)> Packed;
    Packed held[HAS && HELD ? VECS : 1];
    const W* from;
    int n, lane;

    // Of n columns at p.
    __device__ __forceinline__ Affine(const W* p, int n, int lane) : from(p), n(n), lane(lane) {
#pragma unroll
        for (int k = 0; k < VECS; ++k)
            if (HAS && HELD) held[HELD ? k : 0] = load(k);
    }

    __device__ __forceinline__ Packed load(int k) const {
        const int col = (k * LANES + lane) * V;
        const int left = n - col;
        Packed out;
        if (ALIGNED || (left >= V && ((u64)from & (alignof(Packed) - 1)) == 0)) {
            if (left > 0)
                out = *(const Packed*)(from + col);
            else
                clear(out);
            return out;
        }
        clear(out);
        constexpr int PER_WORD = sizeof(W) == 2 ? 2 : 1;
        if constexpr (sizeof(W) == 8) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const u64 bits = i < left ? ((const u64*)from)[col + i] : 0;
                out.w[2 * i] = (u32)bits;
                out.w[2 * i + 1] = (u32)(bits >> 32);
            }
        } else if constexpr (sizeof(W) == 4) {
#pragma unroll
            for (int i = 0; i < V; ++i) out.w[i] = i < left ? ((const u32*)from)[col + i] : 0;
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (i < left) out.w[i / PER_WORD] |= (u32)((const u16*)from)[col + i] << 16 * (i % PER_WORD);
        }
        return out;
    }
    static __device__ __forceinline__ void clear(Packed& out) {
#pragma unroll
        for (int i = 0; i < (int)sizeof(Packed) / 4; ++i) out.w[i] = 0;
    }

    // Of vector k, in the accumulator's type.
    template <class A>
    __device__ __forceinline__ void get(int k, A (&out)[V]) const {
        if constexpr (HAS) unpack_words(HELD ? held[HELD ? k : 0] : load(k), out);
    }
    template <class A>
    static __device__ __forceinline__ void unpack_words(const Packed& packed, A (&out)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = (A)element(packed.w, i, (const W*)0);
    }

    // Vector by vector in order: what is not held is asked for one vector ahead, so that two are on their
    // way and no more. A store of y after each keeps the compiler from loading all at once, and spilling.
    struct Turns {
        Packed next;
    };
    __device__ __forceinline__ Turns begin() const {
        Turns turns;
        if (HAS && !HELD && ALIGNED) turns.next = load(0);
        return turns;
    }
    template <class A>
    __device__ __forceinline__ void get(int k, A (&out)[V], Turns& turns) const {
        if constexpr (HAS) {
            const Packed now = HELD ? held[HELD ? k : 0] : ALIGNED ? turns.next : load(k);
            if (!HELD && ALIGNED && k + 1 < VECS) turns.next = load(k + 1);
            unpack_words(now, out);
        }
    }
};

// Whether weight and bias of VECS vectors fit so many registers while the sums of a row are on their way.
// With more than the limits that are stated where they are used, some architecture spills.
template <class X, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS, int VECS>
__device__ __forceinline__ constexpr bool holds_affine(int limit) {
    return VECS * PerVec<X>::count * (HAS_WEIGHT * (int)sizeof(W) + HAS_BIAS * (int)sizeof(B)) <= 4 * limit;
}

// ---- from x to y -------------------------------------------------------------------------------------

// Turns columns of x into y and writes n[r] of them to y[r]. Every lane of the warp must come here.
template <class Op, class X, int LANES, int VECS, int ROWS, class A, bool HELD, bool ALIGNED, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void normalize_to(
    X* const (&y)[ROWS], const int (&n)[ROWS], Segment<LANES, VECS> (&s)[ROWS], const RowStats<A> (&stats)[ROWS],
    const Affine<HAS_WEIGHT, HELD, ALIGNED, LANES, VECS, PerVec<X>::count, W>& weight,
    const Affine<HAS_BIAS, HELD, ALIGNED, LANES, VECS, PerVec<X>::count, B>& bias, int lane) {
    constexpr int V = PerVec<X>::count;
    auto weights = weight.begin();
    auto biases = bias.begin();
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        if (!ALIGNED && (k * LANES + lane) * V >= weight.n) break;
        A w[V], b[V];
        weight.get(k, w, weights);
        bias.get(k, b, biases);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            A t[V];
            unpack(unseen(s[r].v[k]), t, (const X*)0);
#pragma unroll
            for (int i = 0; i < V; ++i)
                t[i] = affine<HAS_WEIGHT, HAS_BIAS>(
                    normalized<Op, X>(t[i], stats[r]), HAS_WEIGHT ? weight_of<Op>(w[i]) : (A)0, HAS_BIAS ? b[i] : (A)0);
            pack(s[r].v[k], t, (const X*)0);
            const int col = (k * LANES + lane) * V;
            if (ALIGNED && col < n[r]) store16((unsigned char*)(y[r] + col), s[r].v[k]);
        }
    }
    if constexpr (!ALIGNED) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) store_columns<false>(s[r], y[r], n[r], lane);
    }
}

// ---- the residual ------------------------------------------------------------------------------------

// Loads n columns of a row of x and, where there is one, of the residual; `take_row` waits for them.
template <class Op, int LANES, int VECS>
struct LoadedRow {
    Segment<LANES, VECS> x, residual;
};

template <class Op, bool ALIGNED, int LANES, int VECS, class X, class W, class B>
__device__ __forceinline__ void load_row(
    LoadedRow<Op, LANES, VECS>& s, const RowArguments<X, W, B>& a, i64 row, i64 first, int n, int lane) {
    load_granules<ALIGNED>(s.x, row_at(a.x, a, a.x_outer, a.x_row, row, first, n), n, lane);
    if constexpr (Op::residual)
        load_granules<ALIGNED>(
            s.residual, row_at(a.residual, a, a.residual_outer, a.residual_row, row, first, n), n, lane);
}

// a + b, rounded, into a.
template <class X, int LANES, int VECS>
__device__ __forceinline__ void add_vectors(Segment<LANES, VECS>& a, const Segment<LANES, VECS>& b) {
    typedef typename Accumulator<X>::type A;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        A t[PerVec<X>::count], u[PerVec<X>::count];
        unpack(a.v[k], t, (const X*)0);
        unpack(b.v[k], u, (const X*)0);
#pragma unroll
        for (int i = 0; i < PerVec<X>::count; ++i) t[i] += u[i];
        pack(a.v[k], t, (const X*)0);
    }
}

// What is normalized, as columns: x, or x + residual, rounded, which is also written to `sum`. Every lane of
// the warp must come here.
template <class Op, bool ALIGNED, int LANES, int VECS, class X, class W, class B>
__device__ __forceinline__ void take_row(
    LoadedRow<Op, LANES, VECS>& s, const RowArguments<X, W, B>& a, i64 row, i64 first, int n, int lane) {
    granules_to_columns<ALIGNED, X>(s.x, n, lane);
    if constexpr (Op::residual) {
        granules_to_columns<ALIGNED, X>(s.residual, n, lane);
        add_vectors<X>(s.x, s.residual);
        Segment<LANES, VECS> out = s.x;
        store_columns<ALIGNED>(out, row_at(a.sum, a, a.sum_outer, a.sum_row, row, first, n), n, lane);
    }
}
