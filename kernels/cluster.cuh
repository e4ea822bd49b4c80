// Clusters (sm_90 and newer): blocks that run together and write to each other's shared memory.
//
// Two rules hold for every kernel here. No block writes to a peer before a cluster barrier has shown
// that the peer has started, and none reads from a peer: what is exchanged is sent, and read at home
// after the next barrier, so that no block exits while others still need its memory.

// Which block of its cluster this is.
__device__ __forceinline__ int cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}

// The barrier of all threads of the cluster, in two halves. What a thread wrote before it arrived, to
// its own block's memory or to a peer's, the others see after they have waited.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}

__device__ __forceinline__ u32 peer_address(const void* here, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(here)), "r"(rank));
    return there;
}

// Stores `value` where the block of that rank has what this one has at `here`.
__device__ __forceinline__ void send(float* here, int rank, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" : : "r"(peer_address(here, rank)), "f"(value) : "memory");
}
__device__ __forceinline__ void send(double* here, int rank, double value) {
    asm volatile("st.shared::cluster.f64 [%0], %1;" : : "r"(peer_address(here, rank)), "d"(value) : "memory");
}

// The run of a row's chunks that one block of the cluster holds; no two blocks differ by more than one.
struct ChunkRun {
    int begin, count;
};

template <int CLUSTER>
__device__ __forceinline__ ChunkRun chunks_of_block(int chunks, int rank) {
    const int begin = chunks * rank / CLUSTER;
    return ChunkRun{begin, chunks * (rank + 1) / CLUSTER - begin};
}
