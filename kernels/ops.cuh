// What is computed, as a type that the compiler sees. Each trait is read where it is used, once.

template <bool CENTER, bool UNIT_WEIGHT, bool RESIDUAL>
struct Op {
    static constexpr bool center = CENTER;            // the mean is taken off; without: RMS norm
    static constexpr bool unit_weight = UNIT_WEIGHT;  // the weight is told from one: x_hat * (1 + weight)
    static constexpr bool residual = RESIDUAL;        // x is x + residual, which is a result too

    // How often a row whose variance is out of range is looked at again: for its mean, then for its variance.
    static constexpr int looks = CENTER ? 2 : 1;
};

template <class Op, class A>
__device__ __forceinline__ A weight_of(A w) {
    return Op::unit_weight ? w + 1 : w;
}

template <bool HAS_WEIGHT, bool HAS_BIAS, class A>
__device__ __forceinline__ A affine(A x_hat, A w, A b) {
    if (HAS_WEIGHT && HAS_BIAS) return multiply_add(x_hat, w, b);
    return HAS_WEIGHT ? x_hat * w : HAS_BIAS ? x_hat + b : x_hat;
}
