// Fixed-width vectors of independent lanes in the compilers' own vector types (GCC, clang; any processor), and the few
// functions on them that a kernel needs without a branch.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDEST_BYTES = 64;
#elif defined(__AVX__)
constexpr int WIDEST_BYTES = 32;
#else
constexpr int WIDEST_BYTES = 16;
#endif

#define INLINE inline __attribute__((always_inline))

// Constants of the two precisions. Polynomials interpolate at Chebyshev nodes, lowest power first:
// expm1: (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2; sine: (sin(r) / r - 1) / r^2 and cosine: (cos(r) - 1) / r^2 in powers
// of r^2 on |r| <= pi / 2. Relative errors 3e-8 (float) and 4e-17 (double) before rounding.
template <class T> struct Constants;

template <> struct Constants<float> {
  using Bits = uint32_t;
  static constexpr float lowest = -20.0f;         // e^lowest is nothing beside 1
  static constexpr float widest = 1048576.0f;     // phases beyond it have lost themselves in rounding
  static constexpr float rounder = 12582912.0f;   // 1.5 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float bias = 127.0f;           // of the exponent field, above `mantissa` bits
  static constexpr int mantissa = 23, sign = 31;
  static constexpr float expm1[] = {0.5f, 0.16666576f, 0.041666552f, 0.008363233f, 0.001392625f};
  static constexpr float sine[] = {-0.16666666f, 0.008333242f, -0.00019822703f, 2.6346381e-6f};
  static constexpr float cosine[] = {-0.5f, 0.04166666f, -0.001388865f, 2.4774527e-5f, -2.6296286e-7f};
};

template <> struct Constants<double> {
  using Bits = uint64_t;
  static constexpr double lowest = -40.0;
  static constexpr double widest = 1125899906842624.0;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 2^52
  static constexpr double bias = 1023.0;
  static constexpr int mantissa = 52, sign = 63;
  static constexpr double expm1[] = {0.5000000000000001031,    0.1666666666666666746,    0.04166666666662382053,
                                     0.008333333333330038197,  0.001388888891736708056,  0.0001984126986317155603,
                                     0.0000248015210578682052, 2.755726827690569619e-6, 2.762020159103154879e-7,
                                     2.5100472505694996e-8};
  static constexpr double sine[] = {-0.1666666666666666663,   0.008333333333333315747,  -0.0001984126984125488469,
                                    2.75573192191391822e-6,   -2.505210761393476032e-8, 1.605897711407467329e-10,
                                    -7.643963965925356663e-13, 2.731365867494016715e-15};
  static constexpr double cosine[] = {-0.5,
                                      0.04166666666666666598,
                                      -0.001388888888888881472,
                                      0.00002480158730155646276,
                                      -2.755731921756116448e-7,
                                      2.08767562357860197e-9,
                                      -1.147069385703969714e-11,
                                      4.777400781371971987e-14,
                                      -1.516872321789872432e-16};
};

template <class T, int L> struct Lanes {
  typedef T Vector __attribute__((vector_size(sizeof(T) * L)));
  typedef typename Constants<T>::Bits Bits __attribute__((vector_size(sizeof(T) * L)));
};

template <class T, int L> using Vec = typename Lanes<T, L>::Vector;

template <class T, int L> INLINE Vec<T, L> load(const T *from, int64_t count = L) {
  Vec<T, L> value;
  if (count == L) {
    std::memcpy(&value, from, sizeof value);
  } else {
    T some[L] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    std::memcpy(&value, some, sizeof value);
  }
  return value;
}

template <class T, int L> INLINE void store(T *to, Vec<T, L> value, int64_t count = L) {
  if (count == L) {
    std::memcpy(to, &value, sizeof value);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = value[i];
  }
}

template <class T, int L> INLINE Vec<T, L> every(T value) { return Vec<T, L>{} + value; }

template <class T, int L, int N> INLINE Vec<T, L> polynomial(Vec<T, L> r, const T (&coefficients)[N]) {
  Vec<T, L> sum = every<T, L>(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = sum * r + coefficients[i];
  return sum;
}

// Between two bounds, NaN where the value is. Compilers make two instructions of each comparison in its plain form.
template <class T, int L> INLINE Vec<T, L> bounded(Vec<T, L> value, T least, T most) {
  const Vec<T, L> low = every<T, L>(least), high = every<T, L>(most);
#if defined(__AVX512F__)
  if constexpr (sizeof value == 64 && sizeof(T) == 4)
    return (Vec<T, L>)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)value));
  if constexpr (sizeof value == 64 && sizeof(T) == 8)
    return (Vec<T, L>)_mm512_min_pd((__m512d)high, _mm512_max_pd((__m512d)low, (__m512d)value));
#endif
  value = value < low ? low : value;
  return value > high ? high : value;
}

// e^z for z <= 0 as scale (1 + part) with a power of two, relative error a few roundings also in part: with
// z = n ln 2 + r it is 2^n e^r. One product is enough for the reduction: what it loses is scaled by 2^n.
template <class T, int L> INLINE void exp_falling(Vec<T, L> z, Vec<T, L> &scale, Vec<T, L> &part) {
  using K = Constants<T>;
  z = bounded<T, L>(z, K::lowest, T(0));
  const Vec<T, L> shifted = z * T(1.4426950408889634074) + (K::rounder + K::bias);
  const Vec<T, L> r = z - (shifted - (K::rounder + K::bias)) * T(0.69314718055994530942);
  scale = (Vec<T, L>)((typename Lanes<T, L>::Bits)shifted << K::mantissa);
  part = r * r * polynomial<T, L>(r, K::expm1) + r;
}

template <class T, int L> INLINE Vec<T, L> expm1_falling(Vec<T, L> z) {
  Vec<T, L> scale, part;
  exp_falling<T, L>(z, scale, part);
  return scale * part + (scale - T(1));
}

// y = k pi + r: sin(r), cos(r) - 1, the latter accurate near 0 too, and the sign bit of (-1)^k, which turns both sin(y)
// and cos(y). What the rounded pi loses is less than what rounding y has lost.
template <class T, int L>
INLINE void sine_cosm1(Vec<T, L> y, Vec<T, L> &sine, Vec<T, L> &cosm1, typename Lanes<T, L>::Bits &turn) {
  using K = Constants<T>;
  y = bounded<T, L>(y, -K::widest, K::widest);
  const Vec<T, L> shifted = y * T(0.31830988618379067154) + K::rounder;
  const Vec<T, L> r = y - (shifted - K::rounder) * T(3.14159265358979323846);
  turn = (typename Lanes<T, L>::Bits)shifted << K::sign;
  const Vec<T, L> square = r * r;
  sine = r * square * polynomial<T, L>(square, K::sine) + r;
  cosm1 = square * polynomial<T, L>(square, K::cosine);
}

template <class T, int L> INLINE T sum_lanes(Vec<T, L> value) {
  if constexpr (L == 2) {
    return value[0] + value[1];
  } else {
    Vec<T, L / 2> halves[2];
    std::memcpy(halves, &value, sizeof value);
    return sum_lanes<T, L / 2>(halves[0] + halves[1]);
  }
}

template <class T, int L, int... I> INLINE Vec<T, L> shuffled(Vec<T, L> a, Vec<T, L> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T, L>::Bits{I...});
#endif
}

// Lanes whose number has the bit W take b, the others a; each becomes the sum of itself and its partner across W.
template <class T, int L, int W, int... I>
INLINE Vec<T, L> fold(Vec<T, L> a, Vec<T, L> b, std::integer_sequence<int, I...>) {
  return shuffled<T, L, (I & W ? L + I : I)...>(a, b) + shuffled<T, L, (I & W ? L + I - W : I + W)...>(a, b);
}

// L vectors to one that holds the sum of vector i in lane i.
template <class T, int L, int W = L / 2> INLINE Vec<T, L> sums_of(Vec<T, L> *vectors) {
  for (int k = 0; k < W; ++k)
    vectors[k] = fold<T, L, W>(vectors[k], vectors[k + W], std::make_integer_sequence<int, L>());
  if constexpr (W > 1) return sums_of<T, L, W / 2>(vectors);
  return vectors[0];
}

// Sums each of `count` rows of L lanes.
template <class T, int L> INLINE void sum_rows(const T *rows, int64_t count, T *sums) {
  int64_t row = 0;
  for (; row + L <= count; row += L) {
    Vec<T, L> some[L];
    for (int k = 0; k < L; ++k) some[k] = load<T, L>(rows + (row + k) * L);
    store<T, L>(sums + row, sums_of<T, L>(some));
  }
  for (; row < count; ++row) sums[row] = sum_lanes<T, L>(load<T, L>(rows + row * L));
}

// A number of each lane, real or complex; `get` and `put` keep its parts in rows of L lanes, `same` reads one number
// (complex ones as pairs) for all lanes.
template <class T, int L> struct Real {
  using Scalar = T;
  using V = Vec<T, L>;
  static constexpr int lanes = L, parts = 1;
  V re;
  static INLINE Real get(const T *from) { return {load<T, L>(from)}; }
  static INLINE Real same(const T *from) { return {every<T, L>(*from)}; }
  static INLINE Real zero() { return {V{}}; }
  INLINE void put(T *to) const { store<T, L>(to, re); }
  friend INLINE Real operator+(Real a, Real b) { return {a.re + b.re}; }
  friend INLINE Real operator-(Real a, Real b) { return {a.re - b.re}; }
  friend INLINE Real operator*(Real a, Real b) { return {a.re * b.re}; }
  friend INLINE Real operator*(Real a, V b) { return {a.re * b}; }
  friend INLINE Real add_product(Real sum, Real a, Real b) { return {sum.re + a.re * b.re}; }
  friend INLINE V add_real_of_product(V sum, Real a, Real b) { return sum + a.re * b.re; }
  static INLINE Real expm1_of(Real rate, V time) { return {expm1_falling<T, L>(rate.re * time)}; }
};

template <class T, int L> struct Complex {
  using Scalar = T;
  using V = Vec<T, L>;
  static constexpr int lanes = L, parts = 2;
  V re, im;
  static INLINE Complex get(const T *from) { return {load<T, L>(from), load<T, L>(from + L)}; }
  static INLINE Complex same(const T *from) { return {every<T, L>(from[0]), every<T, L>(from[1])}; }
  static INLINE Complex zero() { return {V{}, V{}}; }
  INLINE void put(T *to) const {
    store<T, L>(to, re);
    store<T, L>(to + L, im);
  }
  friend INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  friend INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
  friend INLINE Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
  friend INLINE Complex operator*(Complex a, V b) { return {a.re * b, a.im * b}; }
  // one term after another: every product joins a sum in one instruction
  friend INLINE Complex add_product(Complex sum, Complex a, Complex b) {
    return {sum.re + a.re * b.re - a.im * b.im, sum.im + a.re * b.im + a.im * b.re};
  }
  friend INLINE V add_real_of_product(V sum, Complex a, Complex b) { return sum + a.re * b.re - a.im * b.im; }
  // with e^x = s (1 + p) and the sign of (-1)^k taken by s: s (1 + p) (cos r + i sin r) - 1; near 0 s is 1, and p and
  // cos r - 1 are both <= 0, so that nothing cancels
  static INLINE Complex expm1_of(Complex rate, V time) {
    using Bits = typename Lanes<T, L>::Bits;
    V sine, cosm1, scale, part;
    Bits turn;
    sine_cosm1<T, L>(rate.im * time, sine, cosm1, turn);
    exp_falling<T, L>(rate.re * time, scale, part);
    scale = (V)((Bits)scale ^ turn);
    const V grown = part + T(1);
    return {scale * (cosm1 * grown + part) + (scale - T(1)), scale * grown * sine};
  }
};
