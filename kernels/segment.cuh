// A segment: up to LANES * VECS vectors of one row that a group of LANES lanes holds in registers.
//
// Lane l holds the columns [(k * LANES + l) * V, ... + V) of the segment for k = 0 .. VECS - 1,
// whatever the address. Memory is always accessed in aligned 16-byte granules: when the segment
// starts `skew` bytes past a 16-byte boundary, each lane loads the granule that begins before its
// columns, takes the rest from the next lane by a shuffle and shifts (and the other way round for
// stores). Were the map to follow the address instead, the order of the sums, and so the bits of a
// row, would depend on where the row lies. Only the granules at both ends are accessed in part, in
// naturally aligned pieces; no byte outside the segment is touched.
//
// ALIGNED says that every row begins on a 16-byte boundary and ends with a whole vector, and weight and
// bias begin on one, which the host knows at each launch: nothing is skewed, no vector is cut. The map
// from elements to lanes is the same, and so are the bits.

template <int LANES, int VECS>
struct Segment {
    Vec v[VECS];
    Vec extra;  // the granule that ends in part, until `granules_to_columns`; after `columns_to_granules`
                // granule LANES * VECS, which only a skewed segment has
    int skew;  // of what was loaded
};

__device__ __forceinline__ int skew_of(const void* p) { return (int)((u64)p & 15u); }

// Bytes [at, end) of the granule at p, by whole words and, at both ends of 16-bit elements, half ones;
// the rest is zero. Each load goes to a register of its own, so that nobody waits for one before the
// next is issued; therefore a half word at the front lies in the lower half until `settle_front`.
template <int ELEMENT>
__device__ __forceinline__ Vec load_partial(const unsigned char* p, int at, int end) {
    Vec v = {{0u, 0u, 0u, 0u}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = 4 * i, half = first + (at > first ? 2 : 0);
        if (at <= first && first + 4 <= end)
            v.w[i] = *(const u32*)(p + first);
        else if (ELEMENT == 2 && at <= half && half + 2 <= end)
            v.w[i] = *(const u16*)(p + half);
    }
    return v;
}
template <int ELEMENT>
__device__ __forceinline__ void settle_front(Vec& v, int at) {
    if constexpr (ELEMENT == 2) {
        if (!(at & 2)) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.w[i] <<= at >> 2 == i ? 16 : 0;
    }
}

template <int ELEMENT>
__device__ __forceinline__ void store_partial(const Vec& v, unsigned char* p, int at, int end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = 4 * i, half = first + (at > first ? 2 : 0);
        if (at <= first && first + 4 <= end)
            *(u32*)(p + first) = v.w[i];
        else if (ELEMENT == 2 && at <= half && half + 2 <= end)
            *(u16*)(p + half) = (u16)(v.w[i] >> 8 * (half - first));
    }
}

// Granules of the n elements at p, as they lie in memory; bytes outside the segment read as zero. The
// loads alone: what they bring is first looked at in `granules_to_columns`.
template <bool ALIGNED, int LANES, int VECS, class T>
__device__ __forceinline__ void load_granules(Segment<LANES, VECS>& s, const T* p, int n, int lane) {
    const int skew = ALIGNED ? 0 : skew_of(p);
    const int end = skew + n * (int)sizeof(T);  // in bytes from the first granule
    const unsigned char* base = (const unsigned char*)p - skew;
    const int head = skew != 0;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int g = k * LANES + lane;
        if (g >= head && 16 * g + (ALIGNED ? 0 : 15) < end)
            s.v[k] = load16(base + 16 * g);
        else
            s.v[k] = Vec{{0u, 0u, 0u, 0u}};
    }
    if constexpr (!ALIGNED) {
        const int tail = end >> 4;
        s.skew = skew;
        s.extra = Vec{{0u, 0u, 0u, 0u}};
        if (head && lane == 0 && n > 0) s.v[0] = load_partial<sizeof(T)>(base, skew, end < 16 ? end : 16);
        if ((end & 15) && tail >= head && lane == tail % LANES)
            s.extra = load_partial<sizeof(T)>(base + 16 * tail, 0, end & 15);
    }
}

// Bytes [by, by + 16) of the 32 bytes (lo, hi); `by` is a multiple of the element size.
template <int ELEMENT>
__device__ __forceinline__ Vec funnel(const Vec& lo, const Vec& hi, int by) {
    u32 w[8] = {lo.w[0], lo.w[1], lo.w[2], lo.w[3], hi.w[0], hi.w[1], hi.w[2], hi.w[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = by & 16 ? w[i + 4] : w[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = by & 8 ? w[i + 2] : w[i];
    if (ELEMENT < 8) {
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = by & 4 ? w[i + 1] : w[i];
    }
    if (ELEMENT < 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = by & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
    }
    return Vec{{w[0], w[1], w[2], w[3]}};
}

template <int LANES>
__device__ __forceinline__ Vec shuffle(const Vec& v, int from) {
    Vec out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.w[i] = __shfl_sync(0xffffffffu, v.w[i], from, LANES);
    return out;
}

// From granules to columns. Every lane of the warp must come here, whatever its row's skew: a warp
// may hold several rows, and the shuffles name all 32 lanes.
template <bool ALIGNED, class T, int LANES, int VECS>
__device__ __forceinline__ void granules_to_columns(Segment<LANES, VECS>& s, int n, int lane) {
    if constexpr (!ALIGNED) {
        const int skew = s.skew, tail = (skew + n * (int)sizeof(T)) >> 4;
        if (lane == 0) settle_front<sizeof(T)>(s.v[0], skew);
#pragma unroll
        for (int k = 0; k < VECS; ++k)
            if (tail == k * LANES + lane && tail >= (skew != 0)) s.v[k] = s.extra;
        if (!__any_sync(0xffffffffu, skew)) return;
#pragma unroll
        for (int k = 0; k < VECS; ++k) {
            // Lane 0 passes on what follows the last lane's granule: its own next one.
            Vec mine = s.v[k];
            if (lane == 0) mine = k + 1 < VECS ? s.v[k + 1 < VECS ? k + 1 : k] : s.extra;
            if (lane == 0 && k + 1 == VECS && tail < VECS * LANES) mine = Vec{{0u, 0u, 0u, 0u}};
            s.v[k] = funnel<sizeof(T)>(s.v[k], shuffle<LANES>(mine, (lane + 1) % LANES), skew);
        }
    }
}

// From columns to granules, for a destination `skew` bytes past a boundary; `extra` is the last lane's.
template <bool ALIGNED, class T, int LANES, int VECS>
__device__ __forceinline__ void columns_to_granules(Segment<LANES, VECS>& s, int skew, int lane) {
    if constexpr (!ALIGNED) {
        s.extra = Vec{{0u, 0u, 0u, 0u}};
        if (!__any_sync(0xffffffffu, skew)) return;
        s.extra = funnel<sizeof(T)>(s.v[VECS - 1], s.extra, 16 - skew);
#pragma unroll
        for (int k = VECS - 1; k >= 0; --k) {
            const Vec mine = lane < LANES - 1 ? s.v[k] : s.v[k > 0 ? k - 1 : 0];
            s.v[k] = funnel<sizeof(T)>(shuffle<LANES>(mine, (lane + LANES - 1) % LANES), s.v[k], 16 - skew);
        }
    }
}

template <bool ALIGNED, int LANES, int VECS, class T>
__device__ __forceinline__ void store_granules(const Segment<LANES, VECS>& s, T* p, int n, int lane) {
    const int skew = ALIGNED ? 0 : skew_of(p);
    const int end = skew + n * (int)sizeof(T);
    unsigned char* base = (unsigned char*)p - skew;
    const int head = skew != 0;
#pragma unroll
    for (int k = 0; k < VECS; ++k) {
        const int g = k * LANES + lane;
        if (g >= head && 16 * g + (ALIGNED ? 0 : 15) < end) store16(base + 16 * g, s.v[k]);
    }
    if constexpr (!ALIGNED) {
        if (head && lane == 0 && n > 0) store_partial<sizeof(T)>(s.v[0], base, skew, end < 16 ? end : 16);
        const int tail = end >> 4;
        if ((end & 15) && tail >= head) {
            Vec part = s.extra;
#pragma unroll
            for (int k = 0; k < VECS; ++k)
                if (tail == k * LANES + lane) part = s.v[k];
            // Granule LANES * VECS is the last lane's overhang.
            const int owner = tail == VECS * LANES ? LANES - 1 : tail % LANES;
            if (lane == owner) store_partial<sizeof(T)>(part, base + 16 * tail, 0, end & 15);
        }
    }
}

// Writes a segment of columns to p. Every lane of the warp must come here.
template <bool ALIGNED, int LANES, int VECS, class T>
__device__ __forceinline__ void store_columns(Segment<LANES, VECS>& s, T* p, int n, int lane) {
    columns_to_granules<ALIGNED, T>(s, n ? skew_of(p) : 0, lane);
    // In place, a lane may write the edge that another one has read; shuffles order no memory.
    if (!ALIGNED) __syncwarp(0xffffffffu);
    store_granules<ALIGNED>(s, p, n, lane);
}
