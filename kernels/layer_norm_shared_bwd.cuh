// K3 backward: rows beyond K2's whose dweight and dbias fit shared memory. As K2, but the sums over
// rows lie in shared memory; a thread reads and writes only its own, so they need no barrier.
//
// Shared memory: Piece totals[dweight, dbias][VECS][pieces][THREADS] (those that are wanted), then
// A sums[2][3][WARPS].

template <int THREADS, class A, int V>
struct SharedTotals {
    unsigned char* mine;    // this thread's first piece of dweight, or of dbias where that is alone
    int dbias_at;           // bytes from there to dbias
    static constexpr int PER_VEC = Pieces<A, V>::count * THREADS * 16;  // bytes

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
};

template <int THREADS, int VECS, bool AHEAD, bool DX, bool DWEIGHT, bool DBIAS, class X, class W, bool HAS_WEIGHT>
__device__ __forceinline__ void layer_norm_bwd_shared(const GradientArguments<X, W>& a) {
    typedef typename Accumulator<X>::type A;
    constexpr int V = PerVec<X>::count;
    constexpr int WARPS = THREADS / 32;
    constexpr int COLS = 32 * VECS * V;  // columns of one warp
    typedef SharedTotals<THREADS, A, V> Totals;
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = warp * COLS;
    const int n = at_most(a.N - first, COLS);
    Totals totals = {shared + 16 * threadIdx.x, DWEIGHT ? VECS * Totals::PER_VEC : 0};
    A* sums = (A*)(shared + ((int)DWEIGHT + (int)DBIAS) * VECS * Totals::PER_VEC);
    const A zero[V] = {};
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        if (DWEIGHT) put_pieces(totals.mine + k * Totals::PER_VEC, THREADS, zero);
        if (DBIAS) put_pieces(totals.mine + totals.dbias_at + k * Totals::PER_VEC, THREADS, zero);
    }

    GradientRow<32, VECS, A> next;
    if (AHEAD) fetch(next, a, blockIdx.x, first, n, lane);
    int half = 0;
    for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        GradientRow<32, VECS, A> r;
        if (AHEAD) {
            r = next;
            fetch(next, a, row + gridDim.x, first, n, lane);
        } else {
            fetch(r, a, row, first, n, lane);
        }
        to_columns<X>(r, lane);
        const GradientSums<A> mine = lane_sums<X, HAS_WEIGHT>(r, a.weight, first, n, lane);
        const RowGradient<A> c = row_gradient(block_sums<WARPS>(sums + half, mine, warp, lane), a.N);
        half = 3 * WARPS - half;
        differentiate<X, DX, DWEIGHT, DBIAS, HAS_WEIGHT>(r, c, a.weight, first, n, lane, totals);
        store_dx<DX>(r, a, row, first, n, lane);
    }
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int col = (k * 32 + lane) * V;
        if (col >= n) break;
        A t[V];
        if (DWEIGHT) {
            get_pieces(totals.mine + k * Totals::PER_VEC, THREADS, t);
            put_pieces(partial_row<X>(a.partials, 0, blockIdx.x, gridDim.x, a.N) + first + col, 1, t);
        }
        if (DBIAS) {
            get_pieces(totals.mine + totals.dbias_at + k * Totals::PER_VEC, THREADS, t);
            put_pieces(partial_row<X>(a.partials, DWEIGHT, blockIdx.x, gridDim.x, a.N) + first + col, 1, t);
        }
    }
}
