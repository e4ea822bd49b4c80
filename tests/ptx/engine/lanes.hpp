// What each lane does by itself: arithmetic, comparisons, conversions, moves. PTX ISA 8.8 throughout.
#pragma once
#include <cmath>
#include <tuple>
#include <utility>

#include "state.hpp"

namespace ptx {

// The group stands behind the instruction; who must wait goes back to it.
using Run = void (*)(Warp&, Group&, const Instruction&, u32 active);

// Of each instruction its name in PTX, and its operands, results before the colon: w and l are rows of
// 32 and 64 bits (16-bit values lie in w), p is a predicate, a an address, v what a load or store moves.
struct Handler {
  std::string name, operands;
  Run run;
};

inline std::vector<Handler>& handlers() {
  static std::vector<Handler> table;
  return table;
}

template <class T>
constexpr char letter() {
  return sizeof(T) == 8 ? 'l' : 'w';
}

inline void add(const std::string& name, const std::string& operands, Run run) {
  handlers().push_back({name, operands, run});
}

template <class F, class D, class... S, size_t... K>
inline void apply(Warp& w, const Instruction& i, u32 active, std::index_sequence<K...>) {
  Slot<D>* d = target<D>(w, i.dst[0]);
  const std::tuple<const Slot<S>*...> s{row<S>(w, i.src[K])...};
  auto one = [&](u32 lane) { d[lane] = put<D>(F{}(get<S>(std::get<K>(s)[lane])...)); };
  if (active != ~0u) return each(active, one);
#pragma GCC ivdep
  for (u32 lane = 0; lane < 32; ++lane) one(lane);
}

// d = f(s...), lane by lane.
template <class D, class... S, class F>
inline void map(const std::string& name, F) {
  static_assert(std::is_empty_v<F>);  // a function by name would come as a null pointer
  add(name, std::string{letter<D>(), ':', letter<S>()...},
      [](Warp& w, Group&, const Instruction& i, u32 active) {
        apply<F, D, S...>(w, i, active, std::index_sequence_for<S...>{});
      });
}

// A predicate from two values.
template <class S, class F>
inline void compare(const std::string& name, F) {
  add(name, std::string{'p', ':', letter<S>(), letter<S>()},
      [](Warp& w, Group&, const Instruction& i, u32 active) {
        const Slot<S>*a = row<S>(w, i.src[0]), *b = row<S>(w, i.src[1]);
        u32 mask = 0;
        for (u32 lane = 0; lane < 32; ++lane) mask |= u32(F{}(get<S>(a[lane]), get<S>(b[lane]))) << lane;
        set_predicate(w, i.dst[0], mask, active);
      });
}

template <class F>
inline void logic(const std::string& name, const std::string& operands, F) {
  add(name, operands, [](Warp& w, Group&, const Instruction& i, u32 active) {
    set_predicate(w, i.dst[0], F{}(predicate(w, i.src[0]), predicate(w, i.src[1])), active);
  });
}

template <class T>
inline void select(const std::string& name) {
  add(name, std::string{letter<T>(), ':', letter<T>(), letter<T>(), 'p'},
      [](Warp& w, Group&, const Instruction& i, u32 active) {
        const Slot<T>*a = row<T>(w, i.src[0]), *b = row<T>(w, i.src[1]);
        Slot<T>* d = target<T>(w, i.dst[0]);
        const u32 mask = predicate(w, i.src[2]);
        auto one = [&](u32 lane) { d[lane] = mask >> lane & 1 ? a[lane] : b[lane]; };
        if (active != ~0u) return each(active, one);
#pragma GCC ivdep
        for (u32 lane = 0; lane < 32; ++lane) one(lane);
      });
}

// ---- floating point ----

inline float from_bits(u32 b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}
inline u32 to_bits(float x) {
  u32 b;
  memcpy(&b, &x, 4);
  return b;
}

template <bool ftz>
inline float flushed(float x) {
  if (!ftz) return x;
  u32 b = to_bits(x);
  return from_bits(b & 0x7F800000 ? b : b & 0x80000000);
}
inline double flushed(double x) { return x; }  // .ftz is for float32 alone

// "NaN results are canonical": 0x7fffffff for float32; payloads of float64 are kept.
template <bool ftz>
inline float result(float x) {
  return x != x ? from_bits(0x7FFFFFFF) : flushed<ftz>(x);
}

template <bool ftz, class F>
inline void float32(const std::string& op, F) {
  const std::string name = op + (ftz ? ".ftz.f32" : ".f32");
  if constexpr (std::is_invocable_v<F, float>)
    map<float, float>(name, [](float a) { return result<ftz>(F{}(flushed<ftz>(a))); });
  else if constexpr (std::is_invocable_v<F, float, float>)
    map<float, float, float>(name, [](float a, float b) {
      return result<ftz>(F{}(flushed<ftz>(a), flushed<ftz>(b)));
    });
  else
    map<float, float, float, float>(name, [](float a, float b, float c) {
      return result<ftz>(F{}(flushed<ftz>(a), flushed<ftz>(b), flushed<ftz>(c)));
    });
}

template <class F>
inline void float64(const std::string& op, F f) {
  if constexpr (std::is_invocable_v<F, double>)
    map<double, double>(op + ".f64", f);
  else if constexpr (std::is_invocable_v<F, double, double>)
    map<double, double, double>(op + ".f64", f);
  else
    map<double, double, double, double>(op + ".f64", f);
}

template <class F>
inline void floats(const std::string& op, F f) {
  float32<true>(op, f);
  float32<false>(op, f);
  float64(op, f);
}

template <class F>
inline void float_comparison(const std::string& op, F f) {
  compare<float>("setp." + op + ".ftz.f32",
                 [](float a, float b) { return F{}(flushed<true>(a), flushed<true>(b)); });
  compare<float>("setp." + op + ".f32", f);
  compare<double>("setp." + op + ".f64", f);
}

inline u16 to_half(float x) {
  if (x != x) return 0x7FFF;
  auto half = _Float16(x);
  u16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float from_half(u16 bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return result<false>(float(half));
}
inline u16 to_bfloat(float x) {
  if (x != x) return 0x7FFF;
  u32 b = to_bits(x);
  return u16((b + 0x7FFF + (b >> 16 & 1)) >> 16);  // ties to even
}

inline void add_floats() {
  for (const std::string rounding : {"", ".rn"}) {
    floats("add" + rounding, [](auto a, auto b) { return a + b; });
    floats("sub" + rounding, [](auto a, auto b) { return a - b; });
    floats("mul" + rounding, [](auto a, auto b) { return a * b; });
  }
  floats("div.rn", [](auto a, auto b) { return a / b; });
  floats("rcp.rn", [](auto a) { return decltype(a)(1) / a; });
  floats("sqrt.rn", [](auto a) { return std::sqrt(a); });
  floats("fma.rn", [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  // A NaN loses; -0 is below +0.
  floats("min", [](auto a, auto b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; });
  floats("max", [](auto a, auto b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; });
  map<float, float>("neg.ftz.f32", [](float a) { return -flushed<true>(a); });
  map<float, float>("neg.f32", [](float a) { return -a; });
  map<double, double>("neg.f64", [](double a) { return -a; });
  map<float, float>("abs.ftz.f32", [](float a) { return std::fabs(flushed<true>(a)); });
  map<float, float>("abs.f32", [](float a) { return std::fabs(a); });
  map<double, double>("abs.f64", [](double a) { return std::fabs(a); });
  float_comparison("eq", [](auto a, auto b) { return a == b; });
  float_comparison("ne", [](auto a, auto b) { return a < b || a > b; });
  float_comparison("lt", [](auto a, auto b) { return a < b; });
  float_comparison("le", [](auto a, auto b) { return a <= b; });
  float_comparison("gt", [](auto a, auto b) { return a > b; });
  float_comparison("ge", [](auto a, auto b) { return a >= b; });
  float_comparison("equ", [](auto a, auto b) { return !(a < b || a > b); });
  float_comparison("neu", [](auto a, auto b) { return a != b; });
  float_comparison("ltu", [](auto a, auto b) { return !(a >= b); });
  float_comparison("leu", [](auto a, auto b) { return !(a > b); });
  float_comparison("gtu", [](auto a, auto b) { return !(a <= b); });
  float_comparison("geu", [](auto a, auto b) { return !(a < b); });
  float_comparison("num", [](auto a, auto b) { return a == a && b == b; });
  float_comparison("nan", [](auto a, auto b) { return a != a || b != b; });
  map<u16, float>("cvt.rn.f16.f32", [](float a) { return to_half(a); });
  map<float, u16>("cvt.f32.f16", [](u16 a) { return from_half(a); });
  map<u16, float>("cvt.rn.bf16.f32", [](float a) { return to_bfloat(a); });
  map<u32, float, float>("cvt.rn.f16x2.f32", [](float high, float low) { return u32(to_half(high)) << 16 | to_half(low); });
  map<u32, float, float>("cvt.rn.bf16x2.f32",
                         [](float high, float low) { return u32(to_bfloat(high)) << 16 | to_bfloat(low); });
  map<float, double>("cvt.rn.ftz.f32.f64", [](double a) { return result<true>(float(a)); });
  map<float, double>("cvt.rn.f32.f64", [](double a) { return result<false>(float(a)); });
  map<double, float>("cvt.ftz.f64.f32", [](float a) { return double(flushed<true>(a)); });
  map<double, float>("cvt.f64.f32", [](float a) { return double(a); });
}

// ---- integers ----

template <class T>
inline void integer(const std::string& type) {
  using U = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<sizeof(T) == 8, __int128, i64>;  // holds each product of two
  map<T, T, T>("add." + type, [](T a, T b) { return T(U(a) + U(b)); });
  map<T, T, T>("sub." + type, [](T a, T b) { return T(U(a) - U(b)); });
  map<T, T, T>("mul.lo." + type, [](T a, T b) { return T(u64(a) * u64(b)); });
  map<T, T, T>("mul.hi." + type, [](T a, T b) {
    using W = std::conditional_t<std::is_signed_v<T>, Wide, std::conditional_t<sizeof(T) == 8, unsigned __int128, u64>>;
    return T((W(a) * W(b)) >> (8 * sizeof(T)));
  });
  map<T, T, T, T>("mad.lo." + type, [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); });
  // PTX leaves open what comes of a division by zero: all bits set.
  map<T, T, T>("div." + type, [](T a, T b) { return b == 0 ? T(-1) : b == T(-1) && T(-1) < T(0) ? T(U(0) - U(a)) : T(a / b); });
  map<T, T, T>("rem." + type, [](T a, T b) { return b == 0 ? T(-1) : b == T(-1) && T(-1) < T(0) ? T(0) : T(a % b); });
  map<T, T, T>("min." + type, [](T a, T b) { return std::min(a, b); });
  map<T, T, T>("max." + type, [](T a, T b) { return std::max(a, b); });
  map<T, T, u32>("shr." + type, [](T a, u32 by) { return by < 8 * sizeof(T) ? T(a >> by) : T(a < T(0) ? -1 : 0); });
  compare<T>("setp.eq." + type, [](T a, T b) { return a == b; });
  compare<T>("setp.ne." + type, [](T a, T b) { return a != b; });
  compare<T>("setp.lt." + type, [](T a, T b) { return a < b; });
  compare<T>("setp.le." + type, [](T a, T b) { return a <= b; });
  compare<T>("setp.gt." + type, [](T a, T b) { return a > b; });
  compare<T>("setp.ge." + type, [](T a, T b) { return a >= b; });
  if constexpr (std::is_signed_v<T>) {
    map<T, T>("neg." + type, [](T a) { return T(U(0) - U(a)); });
    map<T, T>("abs." + type, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  }
  map<float, T>("cvt.rn.f32." + type, [](T a) { return float(a); });
  map<double, T>("cvt.rn.f64." + type, [](T a) { return double(a); });
}

template <class T>
inline void widened(const std::string& type) {
  using W = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 4, i64, i32>,
                               std::conditional_t<sizeof(T) == 4, u64, u32>>;
  map<W, T, T>("mul.wide." + type, [](T a, T b) { return W(W(a) * W(b)); });
  map<W, T, T, W>("mad.wide." + type, [](T a, T b, W c) { return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c)); });
}

template <class T>
inline void bits(const std::string& type) {
  map<T, T, T>("and." + type, [](T a, T b) { return T(a & b); });
  map<T, T, T>("or." + type, [](T a, T b) { return T(a | b); });
  map<T, T, T>("xor." + type, [](T a, T b) { return T(a ^ b); });
  map<T, T>("not." + type, [](T a) { return T(~a); });
  map<T, T, u32>("shl." + type, [](T a, u32 by) { return by < 8 * sizeof(T) ? T(a << by) : T(0); });
  map<T, T, u32>("shr." + type, [](T a, u32 by) { return by < 8 * sizeof(T) ? T(a >> by) : T(0); });
  compare<T>("setp.eq." + type, [](T a, T b) { return a == b; });
  compare<T>("setp.ne." + type, [](T a, T b) { return a != b; });
  if constexpr (sizeof(T) > 2) {
    map<u32, T>("clz." + type, [](T a) { return a ? u32(sizeof(T) == 8 ? __builtin_clzll(a) : __builtin_clz(u32(a))) : u32(8 * sizeof(T)); });
    map<u32, T>("popc." + type, [](T a) { return u32(__builtin_popcountll(a)); });
    map<T, T, T, u32, u32>("bfi." + type, [](T a, T b, u32 at, u32 length) {
      at &= 255, length &= 255;
      T mask = 0;
      for (u32 k = at; k < at + length && k < 8 * sizeof(T); ++k) mask |= T(1) << k;
      return T((b & ~mask) | (at < 8 * sizeof(T) ? T(a << at) & mask : T(0)));
    });
  }
}

// PTX ISA, prmt in its default mode: each nibble of c names a byte of {b, a}, or its sign.
inline u32 permuted(u32 a, u32 b, u32 c) {
  const u64 bytes = u64(b) << 32 | a;
  u32 out = 0;
  for (u32 k = 0; k < 4; ++k) {
    u32 name = c >> 4 * k & 15;
    u8 byte = u8(bytes >> 8 * (name & 7));
    if (name & 8) byte = byte & 0x80 ? 0xFF : 0;
    out |= u32(byte) << 8 * k;
  }
  return out;
}

template <class D, class S>
inline void conversion(const std::string& to, const std::string& from) {
  // The result fills its register, of 16 or 32 bits, with its sign or with zeros.
  using R = std::conditional_t<sizeof(D) == 8, D, std::conditional_t<std::is_signed_v<D>, i32, u32>>;
  map<R, S>("cvt." + to + "." + from, [](S a) { return R(D(a)); });
  // Of a 64-bit register the low bits.
  if constexpr (sizeof(S) < 8)
    map<R, u64>("cvt." + to + "." + from + ".wide", [](u64 a) { return R(D(S(a))); });
}

template <class S>
inline void conversions(const std::string& from) {
  conversion<u8, S>("u8", from), conversion<i8, S>("s8", from);
  conversion<u16, S>("u16", from), conversion<i16, S>("s16", from);
  conversion<u32, S>("u32", from), conversion<i32, S>("s32", from);
  conversion<u64, S>("u64", from), conversion<i64, S>("s64", from);
}

inline void add_integers() {
  integer<u16>("u16"), integer<i16>("s16");
  integer<u32>("u32"), integer<i32>("s32");
  integer<u64>("u64"), integer<i64>("s64");
  widened<u16>("u16"), widened<i16>("s16"), widened<u32>("u32"), widened<i32>("s32");
  bits<u16>("b16"), bits<u32>("b32"), bits<u64>("b64");
  map<u32, u32, u32, u32>("shf.l.wrap.b32", [](u32 low, u32 high, u32 by) {
    return u32((u64(high) << 32 | low) << (by & 31) >> 32);
  });
  map<u32, u32, u32, u32>("shf.r.wrap.b32", [](u32 low, u32 high, u32 by) {
    return u32((u64(high) << 32 | low) >> (by & 31));
  });
  map<u32, u32, u32, u32>("prmt.b32", [](u32 a, u32 b, u32 c) { return permuted(a, b, c); });
  conversions<u8>("u8"), conversions<i8>("s8"), conversions<u16>("u16"), conversions<i16>("s16");
  conversions<u32>("u32"), conversions<i32>("s32"), conversions<u64>("u64"), conversions<i64>("s64");
}

// ---- moves ----

inline void special_register(Warp& w, Group&, const Instruction& i, u32 active) {
  Slot<u32>* d = target<u32>(w, i.dst[0]);
  const Block& b = *w.block;
  const Index3& dim = g.block_dim;
  each(active, [&](u32 lane) {
    const u32 t = thread_of(w, lane);
    const u32 values[] = {t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y, dim.x, dim.y, dim.z,
                          b.id.x, b.id.y, b.id.z, g.grid.x, g.grid.y, g.grid.z,
                          lane, b.rank, g.cluster.size};
    d[lane] = values[i.offset];
  });
}
// In the order of the values above.
constexpr const char* kSpecialRegisters =
    "%tid.x %tid.y %tid.z %ntid.x %ntid.y %ntid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y %nctaid.z "
    "%laneid %cluster_ctarank %cluster_nctarank";

template <class Whole, class Part>
inline void packing(const std::string& type) {
  constexpr u32 parts = sizeof(Whole) / sizeof(Part);
  const std::string letters(parts, letter<Part>());
  add("mov." + type + ".pack", std::string{letter<Whole>(), ':'} + letters,
      [](Warp& w, Group&, const Instruction& i, u32 active) {
        each(active, [&](u32 lane) {
          Whole value = 0;
          for (u32 k = 0; k < parts; ++k)
            value |= Whole(get<Part>(row<Part>(w, i.src[k])[lane])) << (8 * sizeof(Part) * k);
          target<Whole>(w, i.dst[0])[lane] = put<Whole>(value);
        });
      });
  add("mov." + type + ".unpack", letters + ':' + letter<Whole>(),
      [](Warp& w, Group&, const Instruction& i, u32 active) {
        each(active, [&](u32 lane) {
          const auto value = get<Whole>(row<Whole>(w, i.src[0])[lane]);
          for (u32 k = 0; k < parts; ++k)
            target<Part>(w, i.dst[k])[lane] = put<Part>(Part(value >> (8 * sizeof(Part) * k)));
        });
      });
}

inline void add_moves() {
  for (const char* type : {"b16", "u16", "s16"}) {
    map<u16, u16>(std::string("mov.") + type, [](u16 a) { return a; });
    select<u16>(std::string("selp.") + type);
  }
  for (const char* type : {"b32", "u32", "s32", "f32"}) {
    map<u32, u32>(std::string("mov.") + type, [](u32 a) { return a; });
    select<u32>(std::string("selp.") + type);
  }
  for (const char* type : {"b64", "u64", "s64", "f64"}) {
    map<u64, u64>(std::string("mov.") + type, [](u64 a) { return a; });
    select<u64>(std::string("selp.") + type);
  }
  // Global memory has one address in every space that reaches it.
  map<u64, u64>("cvta.to.global.u64", [](u64 a) { return a; });
  map<u64, u64>("cvta.global.u64", [](u64 a) { return a; });
  packing<u64, u32>("b64.2"), packing<u64, u16>("b64.4"), packing<u32, u16>("b32.2");
  logic("mov.pred", "p:p", [](u32 a, u32) { return a; });
  logic("not.pred", "p:p", [](u32 a, u32) { return ~a; });
  logic("and.pred", "p:pp", [](u32 a, u32 b) { return a & b; });
  logic("or.pred", "p:pp", [](u32 a, u32 b) { return a | b; });
  logic("xor.pred", "p:pp", [](u32 a, u32 b) { return a ^ b; });
  add("mov.special", "w:", special_register);
}

}  // namespace ptx
