// From a tile to y: normalized, and written along the rows or along the columns.

template <bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ A affine(A x_hat, A w, A b) {
    if (HAS_WEIGHT && HAS_BIAS) return multiply_add(x_hat, w, b);
    return HAS_WEIGHT ? x_hat * w : HAS_BIAS ? x_hat + b : x_hat;
}

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
template <int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A, int PAIR>
__device__ __forceinline__ void store_along_rows(
    const T* tile, Y* y, i64 col_stride, const W* weight, const B* bias, i64 first, int rows, int cols,
    const RowStats<A> (&stats)[PAIR]) {
    typedef Word<Y, PAIR> Wd;
    constexpr int LANES = R / PAIR, PARTS = THREADS / LANES;
    const int r = threadIdx.x % LANES * PAIR, lane = threadIdx.x % 32;
    const bool whole = ((u64)y & (sizeof(Wd) - 1)) == 0 && col_stride % PAIR == 0 && rows % PAIR == 0;
    for (int n = threadIdx.x / LANES; n < cols; n += PARTS) {
        const A w = HAS_WEIGHT ? (A)to_float(weight[first + n]) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(bias[first + n]) : (A)0;
        A t[PAIR];
        Wd out;
#pragma unroll
        for (int i = 0; i < PAIR; ++i) t[i] = 0;
        if (r < rows) read_word(tile + n * Tile<T, R>::PITCH + r, t);
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            t[i] = multiply_add(t[i] - stats[i].mean, stats[i].rstd, stats[i].shift);
            out.e[i] = rounded(affine<HAS_WEIGHT, HAS_BIAS>(t[i], w, b), (const Y*)0);
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
template <int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A>
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
            w[j] = HAS_WEIGHT && (!j || both) ? (A)to_float(weight[first + n + j]) : (A)0;
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
                const A x_hat = multiply_add((A)to_float(x[j]) - stats[r], stats[R + r], stats[2 * R + r]);
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
// A stats[3][R] of shared memory.
template <int THREADS, int R, bool HAS_WEIGHT, bool HAS_BIAS, class T, class Y, class W, class B, class A>
__device__ __forceinline__ void store_along_columns(
    const T* tile, Y* y, i64 row_stride, i64 col_stride, const W* weight, const B* bias, i64 first, int rows,
    int cols, const A* stats) {
    if (col_stride == 1 && in_twos(y, row_stride)) {
        store_twos<THREADS, R, HAS_WEIGHT, HAS_BIAS>(tile, y, row_stride, weight, bias, first, rows, cols, stats);
        return;
    }
    const int span = span_of(cols), lane = threadIdx.x % 32;
    for (int n = lane % span; n < cols; n += span) {
        const A w = HAS_WEIGHT ? (A)to_float(weight[first + n]) : (A)0;
        const A b = HAS_BIAS ? (A)to_float(bias[first + n]) : (A)0;
        for (int i = threadIdx.x / 32; i < R * span / 32; i += THREADS / 32) {
            const int r = row_of_turn(i, lane, span);
            if (r >= rows) continue;
            const A x = (A)to_float(tile[n * Tile<T, R>::PITCH + r]);
            const A x_hat = multiply_add(x - stats[r], stats[R + r], stats[2 * R + r]);
            y[r * row_stride + n * col_stride] = rounded(affine<HAS_WEIGHT, HAS_BIAS>(x_hat, w, b), (const Y*)0);
        }
    }
}
