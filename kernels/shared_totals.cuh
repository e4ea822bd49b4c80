// dweight and dbias of a block's columns in shared memory; a thread reads and writes only its own, so
// they need no barrier.
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
