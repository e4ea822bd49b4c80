// dweight and dbias from the partial sums of the blocks, added in the order of their index: 32 threads
// take every 32nd partial of a column, a fixed tree adds those. No atomics: two runs give the same bits.
//
// A block of 1024 threads makes 32 columns. Shared memory: A sums[32][33]; the odd pitch keeps both the
// writes along a row and the reads along a column free of bank conflicts.

template <class A, class W, class B, bool DWEIGHT, bool DBIAS>
__device__ __forceinline__ void column_totals(
    const A* partials, i64 count, i64 pitch, i64 N, W* dweight, B* dbias) {
    DYNAMIC_SHARED(shared);
    A* sums = (A*)shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 groups = (N + 31) / 32;
    const i64 which = blockIdx.x / groups, group = blockIdx.x - which * groups;
    const i64 col = group * 32 + lane;
    A total = 0;
    if (col < N) {
        const A* p = partials + which * count * pitch + col;
        for (i64 i = warp; i < count; i += 32) total += p[i * pitch];
    }
    sums[warp * 33 + lane] = total;
    __syncthreads();
    total = warp_sum<32>(sums[lane * 33 + warp]);
    const i64 mine = group * 32 + warp;
    if (lane || mine >= N) return;
    if (DWEIGHT && which == 0)
        dweight[mine] = rounded(total, (const W*)0);
    else if (DBIAS)
        dbias[mine] = rounded(total, (const B*)0);
}
