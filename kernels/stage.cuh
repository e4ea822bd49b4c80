// Copies from global to shared memory that do not pass through registers.
//
// cp.async (sm_80) is issued by every thread; a bulk copy (sm_90) by one, and the hardware does the
// rest.

// How a row comes into shared memory: a constant of the plan, which knows the device.
enum { STAGE_REGISTERS, STAGE_ASYNC, STAGE_BULK };

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies an aligned word of 4, 8 or 16 bytes. It has arrived after `staged()` and a barrier, or when
// the barrier completes that `arrive_with_copies` was told of.
template <class Word>
__device__ __forceinline__ void stage(Word* to, const Word* from) {
#if __CUDA_ARCH__ >= 800
    if (sizeof(Word) == 16)  // past L1: nobody reads x twice
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(to)), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :
                     : "r"(shared_address(to)), "l"(from), "n"(sizeof(Word) == 16 ? 8 : (int)sizeof(Word))
                     : "memory");
#else
    *to = *from;
#endif
}
__device__ __forceinline__ void staged() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- barriers that copies arrive at ----------------------------------------------------------------
// u64 in shared memory. Whatever else a thread writes, others see after __syncthreads() alone.

__device__ __forceinline__ void arrival_init(u64* arrival, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(shared_address(arrival)), "r"(count) : "memory");
}

// Puts what this thread has done to shared memory before the bulk copies that it issues next.
__device__ __forceinline__ void fence_bulk() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// This thread arrives when all that it has staged has.
__device__ __forceinline__ void arrive_with_copies(u64* arrival) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(shared_address(arrival)) : "memory");
}

// This thread arrives, and so many bytes of bulk copies are to come.
__device__ __forceinline__ void arrive_expecting(u64* arrival, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(arrival)), "r"(bytes)
                 : "memory");
}

// Both addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* arrival) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(arrival))
                 : "memory");
}

// Waits for the end of the barrier's phase 0, 1, 2, ..., of which `parity` is the last bit.
__device__ __forceinline__ void wait_for(u64* arrival, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define CUPYNORM_WAIT "mbarrier.try_wait.parity"  // sleeps a while
#else
#define CUPYNORM_WAIT "mbarrier.test_wait.parity"
#endif
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\n" CUPYNORM_WAIT ".shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(arrival)), "r"(parity)
                     : "memory");
    } while (!done);
}

// In one access: written out where it is used, the compiler would make it four of a word, whose lanes
// meet in four banks.
__device__ __forceinline__ Vec load_shared16(const Vec* p) { return *p; }
// The compiler would write words that nobody has set, and then some of them again.
__device__ __forceinline__ void store_shared16(Vec* p, const Vec& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(shared_address(p)), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}

// ---- a row in shared memory ------------------------------------------------------------------------

// A row of N elements on its way to Vec at[vecs + 1], where vecs = ceil(N / V), as its granules lie in
// memory: 16 bytes each, the first from the boundary at or before the row. Granules [head, tail) are
// the row's alone and are copied; the one before and the one after are shared with its neighbours, and
// two threads read their parts of them. Lanes then take their columns from two granules and shift, so
// the map from elements to lanes knows no address.
template <class T>
struct StagedRow {
    Vec* at;
    const unsigned char* base;  // of granule 0, in global memory
    int vecs, skew, head, tail, rest;  // `rest`: bytes of the row in granule `tail`

    __device__ __forceinline__ StagedRow(Vec* at, const T* x, int N) : at(at), skew(skew_of(x)) {
        const int end = skew + N * (int)sizeof(T);
        base = (const unsigned char*)x - skew;
        vecs = (N * (int)sizeof(T) + 15) / 16;
        head = skew != 0;
        tail = end >> 4;
        rest = end & 15;
    }

    // Granules of a piece of `count` that starts `first` after the head.
    __device__ __forceinline__ int granules_of(int first, int count) const {
        return at_most(tail - head - first, count);
    }

    // Starts copying a piece, of which `arrival` gets to know. Every thread of the block must come here.
    template <int STAGING, int THREADS>
    __device__ __forceinline__ void copy(int first, int count, u64* arrival) const {
        const int n = granules_of(first, count);
        const unsigned char* from = base + 16 * (i64)(head + first);
        Vec* to = at + head + first;
        if (STAGING == STAGE_BULK) {
            if (threadIdx.x == 0 && n > 0) copy_bulk(to, from, 16 * n, arrival);
        } else {
            for (int g = threadIdx.x; g < n; g += THREADS) stage(to + g, (const Vec*)from + g);
        }
    }

    // The row's part of the granule before its own, or of the one after. It is loaded by one thread,
    // which puts it in its place later: the load's way to memory is then nobody's wait.
    // (A row inside one granule has only the one after.)
    __device__ __forceinline__ Vec load_edge(bool after) const {
        return load_partial<sizeof(T)>(
            base + (after ? 16 * (i64)tail : 0), after && tail ? 0 : skew, after ? rest : head && tail ? 16 : 0);
    }
    __device__ __forceinline__ void put_edge(bool after, Vec edge) const {
        settle_front<sizeof(T)>(edge, after && tail ? 0 : skew);
        if (after) {
            at[tail] = edge;
            if (tail < vecs) at[vecs] = Vec{{0u, 0u, 0u, 0u}};  // shifted in past the row's end
        } else if (head && tail) {
            at[0] = edge;
        }
    }

    // Columns [i * V, i * V + V); past the row's end they are zero.
    template <bool ALIGNED>
    __device__ __forceinline__ Vec columns(int i) const {
        if (i >= vecs) return Vec{{0u, 0u, 0u, 0u}};
        if (ALIGNED || !skew) return load_shared16(at + i);
        return funnel<sizeof(T)>(load_shared16(at + i), load_shared16(at + i + 1), skew);
    }
};

// How many arrive at a barrier in each of its phases.
template <int STAGING, int THREADS>
__device__ __forceinline__ constexpr int arrivals() {
    return STAGING == STAGE_BULK ? 1 : THREADS;
}

// ---- chunks of a row that a block has in shared memory (K3: all, K4: a run of them) --------------------

// The part of a chunk that one warp holds.
template <class X>
struct WarpPart {
    int first, n;  // columns

    __device__ __forceinline__ WarpPart(int N, int chunk, int warp)
        : first(chunk * Chunk<X>::cols + warp * Chunk<X>::warp_cols), n(at_most(N - first, Chunk<X>::warp_cols)) {}
};

template <bool ALIGNED, class X>
__device__ __forceinline__ void take_part(
    Segment<32, CHUNK_VECS>& s, const StagedRow<X>& row, const WarpPart<X>& part, int lane) {
#pragma unroll
    for (int k = 0; k < CHUNK_VECS; ++k)
        s.v[k] = row.template columns<ALIGNED>(part.first / PerVec<X>::count + k * 32 + lane);
}

// Starts the copies of all chunks.
template <bool ALIGNED, int STAGING, int THREADS, class X>
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
    if (!ALIGNED && chunks && threadIdx.x / 2 == 16)  // of the second warp; a block of K4 may have no chunk
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
