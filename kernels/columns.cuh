// K7: columns of their own, each with its address, type and validity, to one matrix. K6's tile, but every
// column is converted on its way in; it holds the type of the statistics.

// One column, as the table in global memory has it.
struct ColumnSource {
    u64 values;
    u64 validity;  // 0, or Arrow's bitmap: bit i of byte i / 8, least significant first, 1 is valid
    i64 stride;    // elements
    i64 type;
};

// `type`, as cupynorm/_cuda/launch.py numbers them.
enum {
    BOOL, UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64,
};

// Each width into a register of its own, and nothing is done to what comes: the first use of a value is the
// wait for it, and that is to come after the last load.
__device__ __forceinline__ u64 load_bits(u64 values, i64 at, i64 type) {
    u32 lo = 0, hi = 0;
    if (type <= INT8)
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(lo) : "l"(values + at));
    else if (type <= INT16 || type == FLOAT16 || type == BFLOAT16)
        asm volatile("ld.global.u16 %0, [%1];" : "=r"(lo) : "l"(values + 2 * at));
    else if (type <= INT32 || type == FLOAT32)
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(lo) : "l"(values + 4 * at));
    else
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(lo), "=r"(hi) : "l"(values + 8 * at));
    return (u64)lo | (u64)hi << 32;
}

// Few cases, since eight columns' stand in a row: an integer's bits are extended to 64, then converted.
template <class A>
__device__ __forceinline__ A value_of(u64 bits, i64 type) {
    if (type == FLOAT32) return (A)bit_cast<float>((u32)bits);
    if (type == FLOAT64) return (A)bit_cast<double>(bits);
    if (type == FLOAT16) return (A)f16_to_float((u32)bits);
    if (type == BFLOAT16) return (A)bit_cast<float>((u32)bits << 16);
    if (type == BOOL) return (A)(bits != 0);
    if (type & 1) return (A)bits;  // unsigned
    const int above = type == INT8 ? 56 : type == INT16 ? 48 : type == INT32 ? 32 : 0;
    return (A)((i64)(bits << above) >> above);
}

__device__ __forceinline__ void set_nan(float& v) { v = bit_cast<float>(0x7fc00000u); }
__device__ __forceinline__ void set_nan(double& v) { v = bit_cast<double>(0x7ff8000000000000ull); }

// Rows [row, row + rows) of `cols` columns. Eight columns are asked for before the first is looked at,
// or too few bytes would be on their way; seven where eight of float64 spill on sm_120.
template <int THREADS, int R, class A>
__device__ __forceinline__ void load_columns(A* tile, const ColumnSource* table, i64 row, int rows, int cols) {
    constexpr int PARTS = THREADS / R, AHEAD = sizeof(A) == 8 ? 7 : 8;
    const int r = threadIdx.x % R;
    if (r >= rows) return;
    row += r;
    tile += r;
    for (int n = threadIdx.x / R; n < cols; n += AHEAD * PARTS) {
        u64 bits[AHEAD];
        u32 valid[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (n + j * PARTS >= cols) break;
            const ColumnSource c = table[n + j * PARTS];
            bits[j] = load_bits(c.values, row * c.stride, c.type);
            valid[j] = 0xffu;
            if (c.validity) asm volatile("ld.global.u8 %0, [%1];" : "=r"(valid[j]) : "l"(c.validity + (row >> 3)));
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (n + j * PARTS >= cols) break;
            A v = value_of<A>(bits[j], table[n + j * PARTS].type);
            if (!(valid[j] >> (row & 7) & 1u)) set_nan(v);
            tile[(n + j * PARTS) * Tile<A, R>::PITCH] = v;
        }
    }
}

template <class Op, int THREADS, int R, bool OUT_ROWS, bool OMIT, class Y, class W, class B, bool HAS_WEIGHT, bool HAS_BIAS>
__device__ __forceinline__ void norm_fwd_columns(
    const ColumnSource* table, Y* y, const W* weight, const B* bias, i64 M, i64 y_row, i64 y_col, i64 N, double eps,
    i64 panel) {
    typedef typename Accumulator<Y>::type A;  // of the tile: the columns' types may hold what y's does not
    DYNAMIC_SHARED(shared);
    A* tile = (A*)shared;
    const i64 m = (i64)blockIdx.x * R;
    const int rows = at_most(M - m, R);
    const auto get = [&](i64 first, int cols) { load_columns<THREADS, R>(tile, table + first, m, rows, cols); };
    const auto to = [&](i64 first) { return y + m * y_row + first * y_col; };
    const auto tell = [](int, const RowStats<A>&) {};
    normalize_tile<Op, THREADS, R, OUT_ROWS, OMIT, HAS_WEIGHT, HAS_BIAS>(
        tile, panel, to, y_row, y_col, weight, bias, rows, N, eps, get, tell);
}
