// K7: columns of their own, each with its address, type and validity, to one matrix. K6's tile, but every
// column is converted on its way in; it holds the type of the statistics.
//
// Shared memory: A tile[panel][PITCH], then A red[3 + OMIT][PARTS][R], then A stats[3][R].

// One column, as the table in global memory has it.
struct ColumnSource {
    u64 values;
    u64 validity;  // 0, or Arrow's bitmap: bit i of byte i / 8, least significant first, 1 is valid
    i64 stride;    // elements
    i64 type;
};

// `type`, as cupynorm/_cuda_columns.py numbers them.
enum {
    BOOL, UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64,
};

__device__ __forceinline__ u64 load_bits(u64 values, i64 at, i64 type) {
    if (type <= INT8) return ((const unsigned char*)values)[at];
    if (type <= INT16 || type == FLOAT16 || type == BFLOAT16) return ((const u16*)values)[at];
    if (type <= INT32 || type == FLOAT32) return ((const u32*)values)[at];
    return ((const u64*)values)[at];
}

template <class A>
__device__ __forceinline__ A value_of(u64 bits, i64 type) {
    switch (type) {
        case BOOL: return (A)(bits != 0);
        case UINT8: return (A)(unsigned char)bits;
        case INT8: return (A)(signed char)bits;
        case UINT16: return (A)(u16)bits;
        case INT16: return (A)(short)bits;
        case UINT32: return (A)(u32)bits;
        case INT32: return (A)(int)bits;
        case UINT64: return (A)bits;
        case INT64: return (A)(i64)bits;
        case FLOAT16: return (A)f16_to_float((u32)bits);
        case BFLOAT16: return (A)bit_cast<float>((u32)bits << 16);
        case FLOAT32: return (A)bit_cast<float>((u32)bits);
        default: return (A)bit_cast<double>(bits);
    }
}

__device__ __forceinline__ void set_nan(float& v) { v = bit_cast<float>(0x7fc00000u); }
__device__ __forceinline__ void set_nan(double& v) { v = bit_cast<double>(0x7ff8000000000000ull); }

// Rows [row, row + rows) of `cols` columns. Eight columns are asked for before the first is looked at,
// or too few bytes would be on their way.
template <int THREADS, int R, class A>
__device__ __forceinline__ void load_columns(A* tile, const ColumnSource* table, i64 row, int rows, int cols) {
    constexpr int PARTS = THREADS / R, AHEAD = 8;
    const int r = threadIdx.x % R;
    if (r >= rows) return;
    row += r;
    tile += r;
    for (int n = threadIdx.x / R; n < cols; n += AHEAD * PARTS) {
        u64 bits[AHEAD];
        u32 valid[AHEAD];
        int type[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (n + j * PARTS >= cols) break;
            const ColumnSource c = table[n + j * PARTS];
            type[j] = (int)c.type;
            bits[j] = load_bits(c.values, row * c.stride, c.type);
            valid[j] = c.validity ? ((const unsigned char*)c.validity)[row >> 3] >> (row & 7) & 1u : 1u;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (n + j * PARTS >= cols) break;
            A v = value_of<A>(bits[j], type[j]);
            if (!valid[j]) set_nan(v);
            tile[(n + j * PARTS) * Tile<A, R>::PITCH] = v;
        }
    }
}

template <int THREADS, int R, bool OUT_ROWS, bool OMIT, class Y, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void layer_norm_fwd_columns(
    const ColumnSource* table, Y* y, const W* weight, const B* bias, i64 M, i64 y_row, i64 y_col, i64 N, double eps,
    i64 panel) {
    typedef typename Accumulator<Y>::type A;
    constexpr int PARTS = THREADS / R;
    DYNAMIC_SHARED(shared);
    A* tile = (A*)shared;
    A* red = (A*)(shared + (panel * Tile<A, R>::PITCH * (i64)sizeof(A) + 15) / 16 * 16);
    A* stats = red + (3 + OMIT) * PARTS * R;
    const i64 m = (i64)blockIdx.x * R;
    const int rows = at_most(M - m, R), r = threadIdx.x % R;
    y += m * y_row;
    const A q = scale_for<A>(N);
    const i64 panels = (N + panel - 1) / panel;

    TileRuns<1, A> runs;
    runs.clear();
    for (i64 p = 0; p < panels; ++p) {
        const i64 first = p * panel;
        const int cols = at_most(N - first, (int)panel);
        if (p) __syncthreads();  // before the tile of the panel before is overwritten
        load_columns<THREADS, R>(tile, table + first, m, rows, cols);
        __syncthreads();
        add_panel<THREADS, R, OMIT>(tile, rows, cols, q, red, runs);
    }
    const RowStats<A> mine[1] = {tile_stats(runs.run[0], runs.shift[0], q, eps)};
    if (!OUT_ROWS && threadIdx.x < R) {
        stats[r] = mine[0].mean;
        stats[R + r] = mine[0].rstd;
        stats[2 * R + r] = mine[0].shift;
    }
    for (i64 p = panels - 1; p >= 0; --p) {
        const i64 first = p * panel;
        const int cols = at_most(N - first, (int)panel);
        if (p < panels - 1) {
            __syncthreads();
            load_columns<THREADS, R>(tile, table + first, m, rows, cols);
        }
        __syncthreads();
        if (OUT_ROWS)
            store_along_rows<THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, y + first * y_col, y_col, weight, bias, first, rows, cols, mine);
        else
            store_along_columns<THREADS, R, HAS_WEIGHT, HAS_BIAS>(
                tile, y + first * y_col, y_row, y_col, weight, bias, first, rows, cols, stats);
    }
}
