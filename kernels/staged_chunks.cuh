// Chunks of a row that a block has in shared memory (K3: all, K4: a run of them).

// The part of a chunk that one warp holds.
template <class X>
struct WarpPart {
    int first, n;  // columns

    __device__ __forceinline__ WarpPart(int N, int chunk, int warp)
        : first(chunk * Chunk<X>::cols + warp * Chunk<X>::warp_cols), n(at_most(N - first, Chunk<X>::warp_cols)) {}
};

template <class X>
__device__ __forceinline__ void take_part(
    Segment<32, CHUNK_VECS>& s, const StagedRow<X>& row, const WarpPart<X>& part, int lane) {
#pragma unroll
    for (int k = 0; k < CHUNK_VECS; ++k) s.v[k] = row.columns(part.first / PerVec<X>::count + k * 32 + lane);
}

// Starts the copies of all chunks.
template <int STAGING, int THREADS, class X>
__device__ __forceinline__ void start_row(const StagedRow<X>& row, u64* arrived, int chunks) {
    constexpr int GRANULES = CHUNK_THREADS * CHUNK_VECS;
    if (threadIdx.x == 0) {
        for (int c = 0; c < chunks; ++c) arrival_init(arrived + c, arrivals<STAGING, THREADS>());
        if (STAGING == STAGE_BULK) fence_bulk();
    }
    if (STAGING == STAGE_ASYNC) __syncthreads();
    for (int c = 0; c < chunks; ++c) {
        if (STAGING == STAGE_BULK && threadIdx.x == 0)
            arrive_expecting(arrived + c, 16 * row.granules_of(c * GRANULES, GRANULES));
        row.template copy<STAGING, THREADS>(c * GRANULES, GRANULES, arrived + c);
        if (STAGING == STAGE_ASYNC) arrive_with_copies(arrived + c);
    }
    if (chunks && threadIdx.x / 2 == 16)  // of the second warp; a block of K4 may have no chunk
        row.put_edge(threadIdx.x % 2, row.load_edge(threadIdx.x % 2));
    __syncthreads();
}

// Waits for a chunk. Where the row is skewed, its first column begins in the last granule that came with
// the chunk before.
template <class X>
__device__ __forceinline__ void wait_for_chunk(const StagedRow<X>& row, u64* arrived, int chunk) {
    if (row.skew && chunk) wait_for(arrived + chunk - 1, 0);
    wait_for(arrived + chunk, 0);
}
