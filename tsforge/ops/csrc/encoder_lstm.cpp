// Transformer encoder layer, LSTM along the variates and LSTM along the horizon, as ReGENN chains them. The equations
// and the order of the weights stand in tsforge/ops/encoder_lstm.py.
//
// A block of windows goes through everything at once, a window a lane, with weights as broadcast numbers: the sizes are
// far too small for matrix products of their own. The backward pass computes a block again before it walks it back, so
// nothing is stored between the passes. What dropout keeps follows from seed, window and place alone. Sums of gradients
// are made of a fixed number of parts, so that they do not depend on the number of threads.
//
// Arrays of a block are [feature][variate][lane], in the sequencer [step][feature][lane].
#include <cmath>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace {

constexpr int64_t PARTS = 16;  // of the sums of gradients
constexpr int64_t CHUNK = 32;  // hidden units of the feed-forward part at a time: they stay in the nearest cache
constexpr double EPSILON = 1e-5;

struct Plan {
  int64_t batch, variates, width, hidden, horizon, encoder, sequencer, threads, seed;
  double rate;
};

// Places of the weights in one array.
struct Places {
  int64_t in_w, in_b, out_w, out_b, norm1_w, norm1_b, up_w, up_b, down_w, down_b, norm2_w, norm2_b;
  int64_t gate_w, gate_r, gate_b, gate_b2, seq_w, seq_r, seq_b, seq_b2, count;
  explicit Places(const Plan &p) {
    int64_t next = 0;
    const auto take = [&next](int64_t size) {
      const int64_t place = next;
      next += size;
      return place;
    };
    const int64_t D = p.width, F = p.hidden, H = p.horizon, V = p.variates;
    const int64_t e = p.encoder ? 1 : 0, s = p.sequencer ? 1 : 0;
    in_w = take(e * 3 * D * D), in_b = take(e * 3 * D), out_w = take(e * D * D), out_b = take(e * D);
    norm1_w = take(e * D), norm1_b = take(e * D);
    up_w = take(e * F * D), up_b = take(e * F), down_w = take(e * D * F), down_b = take(e * D);
    norm2_w = take(e * D), norm2_b = take(e * D);
    gate_w = take(4 * H * D), gate_r = take(4 * H * H), gate_b = take(4 * H), gate_b2 = take(4 * H);
    seq_w = take(s * 4 * V * V), seq_r = take(s * 4 * V * V), seq_b = take(s * 4 * V), seq_b2 = take(s * 4 * V);
    count = next;
  }
};

template <class T> struct Block {
  static constexpr int L = WIDEST_BYTES / sizeof(T);
  static constexpr int64_t N = 2 * L;  // windows of a block
  using V_ = Vec<T, L>;

  // ---- products of weights and lanes

  template <int J>
  static INLINE void product_rows(const T *w, int64_t out, int64_t in, const T *bias, const T *bias2, const T *x,
                                  int64_t xs, T *y, int64_t ys, int64_t inputs, bool add) {
    V_ sums[J][2];
    for (int j = 0; j < J; ++j) {
      const T start = (bias ? bias[j] : T(0)) + (bias2 ? bias2[j] : T(0));
      for (int k = 0; k < 2; ++k)
        sums[j][k] = add ? load<T, L>(y + j * ys + k * L) + start : every<T, L>(start);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      const V_ first = load<T, L>(x + i * xs), second = load<T, L>(x + i * xs + L);
      for (int j = 0; j < J; ++j) {
        const T weight = w[j * out + i * in];
        sums[j][0] += weight * first;
        sums[j][1] += weight * second;
      }
    }
    for (int j = 0; j < J; ++j)
      for (int k = 0; k < 2; ++k) store<T, L>(y + j * ys + k * L, sums[j][k]);
  }

  // y[j][c] (+)= bias[j] + sum_i w[j out + i in] x[i][c] for `columns` lanes, a multiple of N
  static void product(const T *w, int64_t out, int64_t in, const T *bias, const T *bias2, const T *x, int64_t xs, T *y,
                      int64_t ys, int64_t outputs, int64_t inputs, int64_t columns, bool add = false) {
    for (int64_t c = 0; c < columns; c += N) {
      int64_t j = 0;
      const auto at = [&](const T *b) { return b ? b + j : nullptr; };
      for (; j + 4 <= outputs; j += 4)
        product_rows<4>(w + j * out, out, in, at(bias), at(bias2), x + c, xs, y + j * ys + c, ys, inputs, add);
      const int64_t left = outputs - j;
      if (left == 3)
        product_rows<3>(w + j * out, out, in, at(bias), at(bias2), x + c, xs, y + j * ys + c, ys, inputs, add);
      if (left == 2)
        product_rows<2>(w + j * out, out, in, at(bias), at(bias2), x + c, xs, y + j * ys + c, ys, inputs, add);
      if (left == 1)
        product_rows<1>(w + j * out, out, in, at(bias), at(bias2), x + c, xs, y + j * ys + c, ys, inputs, add);
    }
  }

  // w[j ws + i] += sum over `outer_count` stretches of `columns` lanes of dy[j][c] x[i][c]
  static void outer(const T *dy, int64_t dys, int64_t dyo, const T *x, int64_t xs, int64_t xo, T *w, int64_t ws,
                    int64_t outputs, int64_t inputs, int64_t outer_count, int64_t columns) {
    constexpr int J = L / 2 < 4 ? 2 : 4, I = L / J;
    for (int64_t j = 0; j < outputs; j += J) {
      for (int64_t i = 0; i < inputs; i += I) {
        V_ sums[L] = {};
        const T *left[J], *right[I];  // beyond the end the last row stands in, and is not kept
        for (int a = 0; a < J; ++a) left[a] = dy + (j + a < outputs ? j + a : outputs - 1) * dys;
        for (int b = 0; b < I; ++b) right[b] = x + (i + b < inputs ? i + b : inputs - 1) * xs;
        for (int64_t o = 0; o < outer_count; ++o) {
          for (int64_t c = 0; c < columns; c += L) {
            V_ some[I];
            for (int b = 0; b < I; ++b) some[b] = load<T, L>(right[b] + o * xo + c);
            for (int a = 0; a < J; ++a) {
              const V_ one = load<T, L>(left[a] + o * dyo + c);
              for (int b = 0; b < I; ++b) sums[a * I + b] += one * some[b];
            }
          }
        }
        const V_ found = sums_of<T, L>(sums);
        for (int a = 0; a < J && j + a < outputs; ++a)
          for (int b = 0; b < I && i + b < inputs; ++b) w[(j + a) * ws + i + b] += found[a * I + b];
      }
    }
  }

  // b[j] += sum over the lanes of dy[j]
  static void total(const T *dy, int64_t dys, int64_t dyo, T *b, T *b2, int64_t outputs, int64_t outer_count,
                    int64_t columns) {
    for (int64_t j = 0; j < outputs; ++j) {
      V_ sum = {};
      for (int64_t o = 0; o < outer_count; ++o)
        for (int64_t c = 0; c < columns; c += L) sum += load<T, L>(dy + j * dys + o * dyo + c);
      const T found = sum_lanes<T, L>(sum);
      b[j] += found;
      if (b2) b2[j] += found;
    }
  }

  // ---- functions of lanes

  static INLINE V_ size_of(V_ x) { return x < T(0) ? -x : x; }

  static INLINE V_ sigmoid(V_ x) {
    V_ scale, part;
    exp_falling<T, L>(-size_of(x), scale, part);
    const V_ small = scale * part + scale, one = every<T, L>(T(1));
    const V_ found = (x < T(0) ? small : one) / (one + small);
    return x == x ? found : x;
  }

  static INLINE V_ tanh(V_ x) {
    const V_ fall = expm1_falling<T, L>(T(-2) * size_of(x));
    const V_ found = -fall / (fall + T(2));
    return x == x ? (x < T(0) ? -found : found) : x;
  }

  static INLINE V_ square_root(V_ x) {
    for (int i = 0; i < L; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }

  // ---- dropout

  using Bits = typename Lanes<T, L>::Bits;

  static INLINE Bits mixed(Bits x) {
    if constexpr (sizeof(T) == 4) {
      x ^= x >> 16, x *= 0x7feb352dU, x ^= x >> 15, x *= 0x846ca68bU, x ^= x >> 16;
    } else {
      x ^= x >> 30, x *= 0xbf58476d1ce4e5b9ULL, x ^= x >> 27, x *= 0x94d049bb133111ebULL, x ^= x >> 31;
    }
    return x;
  }

  // ---- a block

  const Plan &plan;
  const Places at;
  const T *w;
  const int64_t D, F, H, V, C;  // C lanes of a feature
  const T keep_scale;
  Bits window_bits[2];
  uint64_t place = 0;  // numbers what is dropped
  uint64_t place_of_hidden = 0;

  std::vector<T> memory;
  T *x, *qkv, *p, *pm, *att, *m1, *hat1, *rstd1, *x1, *f, *m2, *hat2, *rstd2, *x2, *gates, *cell, *cell_tanh, *h, *md,
      *ahead, *gates2, *cell2, *cell2_tanh, *h2, *ms, *out;
  T *d_a, *d_b, *d_c, *d_qkv, *d_f, *d_gates, *d_gates2, *d_p, *carry, *carry_c;

  Block(const Plan &given, const T *weights)
      : plan(given),
        at(given),
        w(weights),
        D(given.width),
        F(given.hidden),
        H(given.horizon),
        V(given.variates),
        C(given.variates * N),
        keep_scale(T(1) / T(1 - given.rate)) {
    const int64_t widest = D > H ? D : H;
    int64_t next = 0;
    std::vector<std::pair<T **, int64_t>> wanted;
    const auto take = [&](T *&place_of, int64_t size) {
      wanted.emplace_back(&place_of, next);
      next += (size + 15) / 16 * 16;
    };
    take(x, D * C), take(x2, D * C);
    if (plan.encoder) {
      take(qkv, 3 * D * C), take(p, V * C), take(pm, V * C), take(att, D * C), take(m1, D * C), take(hat1, D * C);
      take(rstd1, C), take(x1, D * C), take(f, CHUNK * C), take(m2, D * C), take(hat2, D * C), take(rstd2, C);
      take(d_qkv, 3 * D * C), take(d_p, V * C), take(d_f, CHUNK * C);
    }
    take(gates, 4 * H * C), take(cell, H * C), take(cell_tanh, H * C), take(h, H * C), take(md, H * C);
    take(ahead, H * C), take(out, H * C), take(d_gates, 4 * H * C);
    if (plan.sequencer) {
      take(gates2, 4 * H * C), take(cell2, H * C), take(cell2_tanh, H * C), take(h2, H * C), take(ms, H * C);
      take(d_gates2, 4 * H * C);
    }
    take(d_a, widest * C), take(d_b, widest * C), take(d_c, widest * C);
    take(carry, (H > V ? H : V) * N), take(carry_c, (H > V ? H : V) * N);
    memory.resize(static_cast<size_t>(next));
    for (const auto &[pointer, offset] : wanted) *pointer = memory.data() + offset;
  }

  // Multiplies, and keeps the factors, 0 or 1 / (1 - rate), where they are asked for.
  INLINE void drop(T *values, T *factors, int64_t features, int64_t columns) {
    if (plan.rate == 0) {
      if (factors)
        for (int64_t k = 0; k < features * columns; ++k) factors[k] = T(1);
      return;
    }
    constexpr auto largest = static_cast<typename Constants<T>::Bits>(-1);
    const auto limit = static_cast<typename Constants<T>::Bits>(double(largest) * plan.rate);
    const V_ kept = every<T, L>(keep_scale), none = {};
    for (int64_t k = 0; k < features * columns; k += N) {
      const auto number = static_cast<typename Constants<T>::Bits>(++place * 0x9e3779b97f4a7c15ULL >> 17);
      for (int half = 0; half < 2; ++half) {
        const Bits found = mixed(window_bits[half] + number);
        const V_ factor = found >= limit ? kept : none;
        store<T, L>(values + k + half * L, load<T, L>(values + k + half * L) * factor);
        if (factors) store<T, L>(factors + k + half * L, factor);
      }
    }
  }

  // `from` [windows][variates][features] to lanes and back
  void take_in(const T *from, T *to, int64_t outer_count, int64_t inner_count, int64_t count, bool swapped) const {
    for (int64_t a = 0; a < outer_count; ++a) {
      for (int64_t b = 0; b < inner_count; ++b) {
        T *lanes = to + (swapped ? b * outer_count + a : a * inner_count + b) * N;
        const T *source = from + a * inner_count + b;
        for (int64_t n = 0; n < count; ++n) lanes[n] = source[n * outer_count * inner_count];
        for (int64_t n = count; n < N; ++n) lanes[n] = T(0);
      }
    }
  }

  void give_out(const T *from, T *to, int64_t outer_count, int64_t inner_count, int64_t count, bool swapped) const {
    for (int64_t a = 0; a < outer_count; ++a) {
      for (int64_t b = 0; b < inner_count; ++b) {
        const T *lanes = from + (swapped ? b * outer_count + a : a * inner_count + b) * N;
        T *target = to + a * inner_count + b;
        for (int64_t n = 0; n < count; ++n) target[n * outer_count * inner_count] = lanes[n];
      }
    }
  }

  // y = LN(r) over the features of each lane; r becomes what is normalised
  void norm(T *r, const T *weight, const T *bias, T *rstd, T *y) const {
    for (int64_t c = 0; c < C; c += L) {
      V_ mean = {}, spread = {};
      for (int64_t d = 0; d < D; ++d) mean += load<T, L>(r + d * C + c);
      mean /= T(D);
      for (int64_t d = 0; d < D; ++d) {
        const V_ away = load<T, L>(r + d * C + c) - mean;
        spread += away * away;
      }
      const V_ inverse = T(1) / square_root(spread / T(D) + T(EPSILON));
      store<T, L>(rstd + c, inverse);
      for (int64_t d = 0; d < D; ++d) {
        const V_ hat = (load<T, L>(r + d * C + c) - mean) * inverse;
        store<T, L>(r + d * C + c, hat);
        store<T, L>(y + d * C + c, hat * weight[d] + bias[d]);
      }
    }
  }

  // dy becomes the gradient of what was normalised
  void norm_back(T *dy, const T *hat, const T *rstd, const T *weight, T *d_weight, T *d_bias) const {
    total(dy, C, 0, d_bias, nullptr, D, 1, C);
    for (int64_t d = 0; d < D; ++d) {
      V_ sum = {};
      for (int64_t c = 0; c < C; c += L) sum += load<T, L>(dy + d * C + c) * load<T, L>(hat + d * C + c);
      d_weight[d] += sum_lanes<T, L>(sum);
    }
    for (int64_t c = 0; c < C; c += L) {
      V_ mean = {}, along = {};
      for (int64_t d = 0; d < D; ++d) {
        const V_ inner = load<T, L>(dy + d * C + c) * weight[d];
        mean += inner;
        along += inner * load<T, L>(hat + d * C + c);
      }
      mean /= T(D), along /= T(D);
      const V_ inverse = load<T, L>(rstd + c);
      for (int64_t d = 0; d < D; ++d) {
        const V_ inner = load<T, L>(dy + d * C + c) * weight[d];
        store<T, L>(dy + d * C + c, inverse * (inner - mean - load<T, L>(hat + d * C + c) * along));
      }
    }
  }

  // Hidden units from `unit` on into f, as many as are returned; what dropout keeps of them is the same each time.
  int64_t hidden_units(int64_t unit) {
    const int64_t units = F - unit < CHUNK ? F - unit : CHUNK;
    product(w + at.up_w + unit * D, D, 1, w + at.up_b + unit, nullptr, x1, C, f, C, units, D, C);
    for (int64_t i = 0; i < units * C; i += L) {
      const V_ value = load<T, L>(f + i);
      store<T, L>(f + i, value < T(0) ? V_{} : value);
    }
    place = place_of_hidden + static_cast<uint64_t>(unit * V);
    drop(f, nullptr, units, C);
    return units;
  }

  void encode() {
    const T scale = T(1) / std::sqrt(T(D));
    product(w + at.in_w, D, 1, w + at.in_b, nullptr, x, C, qkv, C, 3 * D, D, C);
    const T *q = qkv, *k = qkv + D * C, *v = qkv + 2 * D * C;
    for (int64_t a = 0; a < V; ++a) {
      for (int64_t n = 0; n < N; n += L) {
        V_ most = every<T, L>(-INFINITY), sum = {};
        for (int64_t b = 0; b < V; ++b) {
          V_ score = {};
          for (int64_t d = 0; d < D; ++d)
            score += load<T, L>(q + d * C + a * N + n) * load<T, L>(k + d * C + b * N + n);
          score *= scale;
          most = score > most ? score : most;
          store<T, L>(p + (a * V + b) * N + n, score);
        }
        for (int64_t b = 0; b < V; ++b) {
          V_ power, part;
          exp_falling<T, L>(load<T, L>(p + (a * V + b) * N + n) - most, power, part);
          const V_ value = power * part + power;
          sum += value;
          store<T, L>(p + (a * V + b) * N + n, value);
        }
        for (int64_t b = 0; b < V; ++b)
          store<T, L>(p + (a * V + b) * N + n, load<T, L>(p + (a * V + b) * N + n) / sum);
      }
    }
    for (int64_t i = 0; i < V * C; ++i) pm[i] = T(1);
    drop(pm, nullptr, V * V, N);
    for (int64_t a = 0; a < V; ++a) {
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t n = 0; n < N; n += L) {
          V_ sum = {};
          for (int64_t b = 0; b < V; ++b) {
            const int64_t cell_of = (a * V + b) * N + n;
            sum += load<T, L>(p + cell_of) * load<T, L>(pm + cell_of) * load<T, L>(v + d * C + b * N + n);
          }
          store<T, L>(att + d * C + a * N + n, sum);
        }
      }
    }
    product(w + at.out_w, D, 1, w + at.out_b, nullptr, att, C, hat1, C, D, D, C);
    drop(hat1, m1, D, C);
    for (int64_t i = 0; i < D * C; ++i) hat1[i] += x[i];
    norm(hat1, w + at.norm1_w, w + at.norm1_b, rstd1, x1);
    place_of_hidden = place;
    for (int64_t unit = 0; unit < F; unit += CHUNK) {
      const int64_t units = hidden_units(unit);
      product(w + at.down_w + unit, F, 1, unit ? nullptr : w + at.down_b, nullptr, f, C, hat2, C, D, units, C, unit > 0);
    }
    drop(hat2, m2, D, C);
    for (int64_t i = 0; i < D * C; ++i) hat2[i] += x1[i];
    norm(hat2, w + at.norm2_w, w + at.norm2_b, rstd2, x2);
  }

  // One step of an LSTM: gates [4 K] of input products become activations; c_before null at the first step.
  static void lstm_step(T *g, int64_t gs, int64_t K, const T *c_before, T *c, T *c_tanh, T *h_now, int64_t hs) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < N; n += L) {
        const V_ i = sigmoid(load<T, L>(g + k * gs + n)), keep = sigmoid(load<T, L>(g + (K + k) * gs + n));
        const V_ z = tanh(load<T, L>(g + (2 * K + k) * gs + n)), o = sigmoid(load<T, L>(g + (3 * K + k) * gs + n));
        V_ state = i * z;
        if (c_before) state += keep * load<T, L>(c_before + k * hs + n);
        const V_ shown = tanh(state);
        store<T, L>(g + k * gs + n, i), store<T, L>(g + (K + k) * gs + n, keep);
        store<T, L>(g + (2 * K + k) * gs + n, z), store<T, L>(g + (3 * K + k) * gs + n, o);
        store<T, L>(c + k * hs + n, state), store<T, L>(c_tanh + k * hs + n, shown);
        store<T, L>(h_now + k * hs + n, o * shown);
      }
    }
  }

  // d_h + carry through a step back to its gates; carry_c passes the gradient of the cell on.
  void lstm_step_back(const T *g, T *dg, int64_t gs, int64_t K, const T *c_before, const T *c_tanh, const T *d_h,
                      int64_t hs) const {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < N; n += L) {
        const V_ i = load<T, L>(g + k * gs + n), keep = load<T, L>(g + (K + k) * gs + n);
        const V_ z = load<T, L>(g + (2 * K + k) * gs + n), o = load<T, L>(g + (3 * K + k) * gs + n);
        const V_ shown = load<T, L>(c_tanh + k * hs + n);
        const V_ back = load<T, L>(d_h + k * hs + n) + load<T, L>(carry + k * N + n);
        const V_ d_state = back * o * (T(1) - shown * shown) + load<T, L>(carry_c + k * N + n);
        const V_ before = c_before ? load<T, L>(c_before + k * hs + n) : V_{};
        store<T, L>(dg + k * gs + n, d_state * z * i * (T(1) - i));
        store<T, L>(dg + (K + k) * gs + n, d_state * before * keep * (T(1) - keep));
        store<T, L>(dg + (2 * K + k) * gs + n, d_state * i * (T(1) - z * z));
        store<T, L>(dg + (3 * K + k) * gs + n, back * shown * o * (T(1) - o));
        store<T, L>(carry_c + k * N + n, d_state * keep);
      }
    }
  }

  void forward(const T *rows, int64_t first, int64_t count) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < L; ++i) {
        const uint64_t window = static_cast<uint64_t>(first + half * L + i) + 1;
        window_bits[half][i] = static_cast<typename Constants<T>::Bits>(
            (static_cast<uint64_t>(plan.seed) + window * 0xd1342543de82ef95ULL) * 0x9e3779b97f4a7c15ULL >> 13);
      }
      window_bits[half] = mixed(window_bits[half]);
    }
    place = 0;
    take_in(rows + first * V * D, x, V, D, count, true);
    if (plan.encoder) {
      encode();
    } else {
      for (int64_t i = 0; i < D * C; ++i) x2[i] = x[i];
    }
    product(w + at.gate_w, D, 1, w + at.gate_b, w + at.gate_b2, x2, C, gates, C, 4 * H, D, C);
    for (int64_t v = 0; v < V; ++v) {
      const int64_t now = v * N, before = now - N;
      if (v) product(w + at.gate_r, H, 1, nullptr, nullptr, h + before, C, gates + now, C, 4 * H, H, N, true);
      lstm_step(gates + now, C, H, v ? cell + before : nullptr, cell + now, cell_tanh + now, h + now, C);
    }
    for (int64_t i = 0; i < H * C; ++i) ahead[i] = h[i];
    drop(ahead, md, H, C);
    if (!plan.sequencer) {
      for (int64_t i = 0; i < H * C; ++i) out[i] = ahead[i];
      return;
    }
    for (int64_t t = 0; t < H; ++t) {
      T *g = gates2 + 4 * t * C;
      product(w + at.seq_w, V, 1, w + at.seq_b, w + at.seq_b2, ahead + t * C, N, g, N, 4 * V, V, N);
      if (t) product(w + at.seq_r, V, 1, nullptr, nullptr, h2 + (t - 1) * C, N, g, N, 4 * V, V, N, true);
      lstm_step(g, N, V, t ? cell2 + (t - 1) * C : nullptr, cell2 + t * C, cell2_tanh + t * C, h2 + t * C, N);
    }
    for (int64_t i = 0; i < H * C; ++i) out[i] = h2[i];
    drop(out, ms, H, C);
    for (int64_t i = 0; i < H * C; ++i) out[i] += ahead[i];
  }

  void start_carry(int64_t K) const {
    for (int64_t i = 0; i < K * N; ++i) carry[i] = carry_c[i] = T(0);
  }

  // Adds to the gradients `dw` of the weights.
  void backward(const T *d_out, T *d_rows, T *dw, int64_t first, int64_t count) {
    T *d_ahead = d_a, *d_h2 = d_b;
    take_in(d_out + first * H * V, d_ahead, H, V, count, false);
    if (plan.sequencer) {
      for (int64_t i = 0; i < H * C; ++i) d_h2[i] = d_ahead[i] * ms[i];
      start_carry(V);
      for (int64_t t = H; t-- > 0;) {
        T *dg = d_gates2 + 4 * t * C;
        lstm_step_back(gates2 + 4 * t * C, dg, N, V, t ? cell2 + (t - 1) * C : nullptr, cell2_tanh + t * C,
                       d_h2 + t * C, N);
        product(w + at.seq_r, 1, V, nullptr, nullptr, dg, N, carry, N, V, 4 * V, N);
        product(w + at.seq_w, 1, V, nullptr, nullptr, dg, N, d_ahead + t * C, N, V, 4 * V, N, true);
      }
      outer(d_gates2, N, 4 * C, ahead, N, C, dw + at.seq_w, V, 4 * V, V, H, N);
      outer(d_gates2 + 4 * C, N, 4 * C, h2, N, C, dw + at.seq_r, V, 4 * V, V, H - 1, N);
      total(d_gates2, N, 4 * C, dw + at.seq_b, dw + at.seq_b2, 4 * V, H, N);
    }
    for (int64_t i = 0; i < H * C; ++i) d_ahead[i] *= md[i];
    start_carry(H);
    for (int64_t v = V; v-- > 0;) {
      const int64_t now = v * N;
      lstm_step_back(gates + now, d_gates + now, C, H, v ? cell + now - N : nullptr, cell_tanh + now, d_ahead + now, C);
      if (v) product(w + at.gate_r, 1, H, nullptr, nullptr, d_gates + now, C, carry, N, H, 4 * H, N);
    }
    T *d_x = d_b;
    product(w + at.gate_w, 1, D, nullptr, nullptr, d_gates, C, d_x, C, D, 4 * H, C);
    outer(d_gates, C, 0, x2, C, 0, dw + at.gate_w, D, 4 * H, D, 1, C);
    if (V > 1) outer(d_gates + N, C, 0, h, C, 0, dw + at.gate_r, H, 4 * H, H, 1, C - N);
    total(d_gates, C, 0, dw + at.gate_b, dw + at.gate_b2, 4 * H, 1, C);
    if (plan.encoder) encode_back(d_x, dw);
    give_out(d_x, d_rows + first * V * D, V, D, count, true);
  }

  // d_x, the gradient of what the encoder gives, becomes that of what it takes.
  void encode_back(T *d_x, T *dw) {
    T *inner = d_a;
    norm_back(d_x, hat2, rstd2, w + at.norm2_w, dw + at.norm2_w, dw + at.norm2_b);
    for (int64_t i = 0; i < D * C; ++i) inner[i] = d_x[i] * m2[i];
    total(inner, C, 0, dw + at.down_b, nullptr, D, 1, C);
    for (int64_t unit = 0; unit < F; unit += CHUNK) {
      const int64_t units = hidden_units(unit);
      outer(inner, C, 0, f, C, 0, dw + at.down_w + unit, F, D, units, 1, C);
      product(w + at.down_w + unit, 1, F, nullptr, nullptr, inner, C, d_f, C, units, D, C);
      for (int64_t i = 0; i < units * C; i += L) {
        const V_ passed = load<T, L>(d_f + i) * (plan.rate == 0 ? T(1) : keep_scale);
        store<T, L>(d_f + i, load<T, L>(f + i) > T(0) ? passed : V_{});
      }
      outer(d_f, C, 0, x1, C, 0, dw + at.up_w + unit * D, D, units, D, 1, C);
      total(d_f, C, 0, dw + at.up_b + unit, nullptr, units, 1, C);
      product(w + at.up_w + unit * D, 1, D, nullptr, nullptr, d_f, C, d_x, C, D, units, C, true);
    }
    norm_back(d_x, hat1, rstd1, w + at.norm1_w, dw + at.norm1_w, dw + at.norm1_b);
    for (int64_t i = 0; i < D * C; ++i) inner[i] = d_x[i] * m1[i];
    outer(inner, C, 0, att, C, 0, dw + at.out_w, D, D, D, 1, C);
    total(inner, C, 0, dw + at.out_b, nullptr, D, 1, C);
    T *d_att = d_c;
    product(w + at.out_w, 1, D, nullptr, nullptr, inner, C, d_att, C, D, D, C);
    attention_back(d_att);
    outer(d_qkv, C, 0, x, C, 0, dw + at.in_w, D, 3 * D, D, 1, C);
    total(d_qkv, C, 0, dw + at.in_b, nullptr, 3 * D, 1, C);
    product(w + at.in_w, 1, D, nullptr, nullptr, d_qkv, C, d_x, C, D, 3 * D, C, true);
  }

  // Writes the gradients of queries, keys and values to d_qkv.
  void attention_back(const T *d_att) {
    const T scale = T(1) / std::sqrt(T(D));
    const T *q = qkv, *k = qkv + D * C, *v = qkv + 2 * D * C;
    T *d_q = d_qkv, *d_k = d_qkv + D * C, *d_v = d_qkv + 2 * D * C;
    for (int64_t a = 0; a < V; ++a) {
      for (int64_t n = 0; n < N; n += L) {
        V_ along = {};
        for (int64_t b = 0; b < V; ++b) {
          const int64_t cell_of = (a * V + b) * N + n;
          V_ sum = {};
          for (int64_t d = 0; d < D; ++d)
            sum += load<T, L>(d_att + d * C + a * N + n) * load<T, L>(v + d * C + b * N + n);
          sum *= load<T, L>(pm + cell_of);
          along += sum * load<T, L>(p + cell_of);
          store<T, L>(d_p + cell_of, sum);
        }
        for (int64_t b = 0; b < V; ++b) {
          const int64_t cell_of = (a * V + b) * N + n;
          store<T, L>(d_p + cell_of, load<T, L>(p + cell_of) * (load<T, L>(d_p + cell_of) - along) * scale);
        }
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t a = 0; a < V; ++a) {
        for (int64_t n = 0; n < N; n += L) {
          V_ of_q = {}, of_k = {}, of_v = {};
          for (int64_t b = 0; b < V; ++b) {
            const int64_t ab = (a * V + b) * N + n, ba = (b * V + a) * N + n, other = d * C + b * N + n;
            of_q += load<T, L>(d_p + ab) * load<T, L>(k + other);
            of_k += load<T, L>(d_p + ba) * load<T, L>(q + other);
            of_v += load<T, L>(p + ba) * load<T, L>(pm + ba) * load<T, L>(d_att + other);
          }
          const int64_t own = d * C + a * N + n;
          store<T, L>(d_q + own, of_q), store<T, L>(d_k + own, of_k), store<T, L>(d_v + own, of_v);
        }
      }
    }
  }
};

template <class T> void run_forward(const Plan &plan, const T *w, const T *rows, T *out) {
  using B = Block<T>;
  const int64_t blocks = (plan.batch + B::N - 1) / B::N;
  parallel_for(blocks, plan.threads, [&](int64_t, int64_t begin, int64_t end) {
    B block(plan, w);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * B::N, count = plan.batch - first < B::N ? plan.batch - first : B::N;
      block.forward(rows, first, count);
      block.give_out(block.out, out + first * plan.horizon * plan.variates, plan.horizon, plan.variates, count, false);
    }
  });
}

template <class T>
void run_backward(const Plan &plan, const T *w, const T *rows, const T *d_out, T *d_rows, T *d_w) {
  using B = Block<T>;
  const int64_t blocks = (plan.batch + B::N - 1) / B::N, size = Places(plan).count;
  const int64_t parts = blocks < PARTS ? blocks : PARTS;
  std::vector<T> sums(static_cast<size_t>(parts * size), T(0));
  parallel_for(parts, plan.threads, [&](int64_t, int64_t begin, int64_t end) {
    B block(plan, w);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t k = blocks * part / parts; k < blocks * (part + 1) / parts; ++k) {
        const int64_t first = k * B::N, count = plan.batch - first < B::N ? plan.batch - first : B::N;
        block.forward(rows, first, count);
        block.backward(d_out, d_rows, sums.data() + part * size, first, count);
      }
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    T sum = T(0);
    for (int64_t part = 0; part < parts; ++part) sum += sums[static_cast<size_t>(part * size + i)];
    d_w[i] = sum;
  }
}

Plan read(const int64_t *numbers, double rate) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
          numbers[5], numbers[6], numbers[7], numbers[8], rate};
}

}  // namespace

// numbers: batch, variates, width, hidden, horizon, encoder, sequencer, threads, seed, bytes of a number
extern "C" {

void encoder_lstm_forward(const int64_t *numbers, double rate, const void *w, const void *rows, void *out) {
  const Plan plan = read(numbers, rate);
  if (numbers[9] == 4)
    run_forward<float>(plan, (const float *)w, (const float *)rows, (float *)out);
  else
    run_forward<double>(plan, (const double *)w, (const double *)rows, (double *)out);
}

void encoder_lstm_backward(const int64_t *numbers, double rate, const void *w, const void *rows, const void *d_out,
                     void *d_rows, void *d_w) {
  const Plan plan = read(numbers, rate);
  if (numbers[9] == 4)
    run_backward<float>(plan, (const float *)w, (const float *)rows, (const float *)d_out, (float *)d_rows,
                        (float *)d_w);
  else
    run_backward<double>(plan, (const double *)w, (const double *)rows, (const double *)d_out, (double *)d_rows,
                         (double *)d_w);
}
}
