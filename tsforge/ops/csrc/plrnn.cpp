// The shallow piecewise-linear recurrence under teacher forcing, its adjoint, and its free run.
//
//     u = W2 z~,  z = A z~ + W1 phi(u) + h1 + input,  phi = relu(u + h2), clipped: relu(u + h2) - relu(u)
//
// Lanes are neighbouring hidden units; a job walks a block of samples (rows) of one group through time, so that weights
// and hidden values stay in a cache. Weights are packed [H / 2L][M][2L], the gradients likewise; the matrix that sums
// over hidden units is packed a second time as [H][M], latent units in the lanes, if M fills them. Hidden values live
// for a few steps only: then they join the weight gradients, which reads and writes those once for all rows of these
// steps. A single sample reads every weight once a step, so that the cache which holds them sets its pace.
// Results of a sample do not depend on its block; gradients are summed in an order fixed by the sizes.
#include "lanes.h"
#include "parallel.h"

namespace {

enum Plan {
  GROUPS, BATCH, STEPS, LATENT, HIDDEN, CLIPPED, EVERY, BYTES, THREADS,  // of every EVERY-th step the state is stored
  ALPHA_G, ALPHA_T, ALPHA_B, ALPHA_M,                                    // strides
  FORWARD_SCRATCH, BACKWARD_SCRATCH,                                     // out, in reals
};

constexpr int64_t MOST_ROWS = 16, MOST_PARTS = 32, KEPT_ROWS = 32;
constexpr int TILE = WIDEST_BYTES == 64 ? 4 : 2;  // a tile of TILE x 4 sums and its operands fits the registers

template <int N> using Int = std::integral_constant<int, N>;

// Calls f(Int<size>, begin) for tiles of [0, count) of nearly equal sizes from LEAST to MOST; LEAST above 1 is for
// counts above MOST / 2.
template <int LEAST, int MOST, class F> INLINE void with_size(int64_t size, int64_t begin, const F &f) {
  if (size == MOST) f(Int<MOST>(), begin);
  else if constexpr (MOST > LEAST) with_size<LEAST, MOST - 1>(size, begin, f);
}
template <int MOST, int LEAST = 1, class F> INLINE void in_tiles(int64_t count, const F &f) {
  const int64_t tiles = (count + MOST - 1) / MOST;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = count * i / tiles;
    with_size<LEAST, MOST>(count * (i + 1) / tiles - begin, begin, f);
  }
}

// Calls f(Int<S>, row, Int<P>, pair) for tiles of samples and of pairs of vectors. A vector read serves S samples, a
// number of a sample 2 P vectors: many samples take long columns of single pairs.
template <class F> INLINE void in_grid(int64_t rows, int64_t pairs, const F &f) {
  if (rows <= TILE)
    in_tiles<2>(pairs, [&](auto P, int64_t pair) {
      in_tiles<TILE>(rows, [&](auto S, int64_t row) { f(S, row, P, pair); });
    });
  else
    for (int64_t pair = 0; pair < pairs; ++pair)
      in_tiles<2 * TILE, TILE>(rows, [&](auto S, int64_t row) { f(S, row, Int<1>(), pair); });
}

int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }  // 64 bytes and more

struct Sizes {
  int64_t m, h, pairs, stride, width, across, rows, blocks, parts, kept, weights, gradients;
  Sizes(const int64_t *plan, int64_t lanes) : m(plan[LATENT]), h(plan[HIDDEN]) {
    pairs = (h + 2 * lanes - 1) / (2 * lanes);
    stride = (m | 1) * 2 * lanes;  // odd: columns spread over the sets of a cache
    width = (2 * pairs + 1) * lanes;
    const int64_t padded = (m + 2 * lanes - 1) / (2 * lanes) * 2 * lanes;
    across = 4 * m >= 3 * padded ? padded : 0;  // length of a row with latent units in the lanes, where they fill them
    const int64_t half = ((plan[BATCH] + 1) / 2 + 3) / 4 * 4;
    rows = plan[BATCH] <= 4 ? plan[BATCH] : half < MOST_ROWS ? half : MOST_ROWS;
    if (rows < 1) rows = 1;
    blocks = (plan[BATCH] + rows - 1) / rows;
    parts = blocks < MOST_PARTS ? blocks : MOST_PARTS;
    kept = KEPT_ROWS / rows < plan[STEPS] ? KEPT_ROWS / rows : plan[STEPS];
    if (kept < 1) kept = 1;
    weights = rounded(2 * (pairs * stride + pairs * lanes) + h * across);
    gradients = rounded(2 * (pairs * stride + pairs * lanes) + 2 * m);
  }
  int64_t place(int64_t hidden, int64_t latent, int64_t lanes) const {  // of a weight
    return hidden / (2 * lanes) * stride + latent * 2 * lanes + hidden % (2 * lanes);
  }
  int64_t elements() const { return rounded(rows * m); }
  int64_t forward() const { return weights + 8 * elements() + rounded(rows * width); }
  int64_t backward() const { return weights + (10 + 2 * kept) * elements() + 2 * rounded(kept * rows * width); }
};

template <class T> struct Arguments {
  const int64_t *plan;
  const T *z1, *forcing, *alpha, *a, *w1, *w2, *h1, *h2, *inputs;
  T *scratch, *z;
  const T *d_z = nullptr;
  T *d_z1 = nullptr, *d_inputs = nullptr, *partial = nullptr;
  T *d_a = nullptr, *d_w1 = nullptr, *d_w2 = nullptr, *d_h1 = nullptr, *d_h2 = nullptr;
};

template <class T, int L> INLINE Vec<T, L> relu(Vec<T, L> value) {  // of NaN it is NaN
  const Vec<T, L> zero{};
#if defined(__AVX512F__)
  if constexpr (sizeof value == 64 && sizeof(T) == 4) return (Vec<T, L>)_mm512_max_ps((__m512)zero, (__m512)value);
  if constexpr (sizeof value == 64 && sizeof(T) == 8) return (Vec<T, L>)_mm512_max_pd((__m512d)zero, (__m512d)value);
#endif
  return value < zero ? zero : value;
}

// sums[s][v] += sum over m of w[v][m] x[s][m]
template <class T, int L, int S, int V>
INLINE void expand(const T *w, int64_t stride, int64_t m, const T *x, Vec<T, L> (&sums)[S][V]) {
  for (int64_t k = 0; k < m; ++k) {
    Vec<T, L> column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = load<T, L>(w + v / 2 * stride + (2 * k + v % 2) * L);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const Vec<T, L> value = every<T, L>(x[s * m + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[s][v] += column[v] * value;
    }
  }
}

// y[s][m] = sum over h of w[h][m] p[s][h]
template <class T, int L> void reduce(const Sizes &z, int64_t rows, const T *w, const T *p, T *y) {
  in_tiles<4>(rows, [&](auto S, int64_t row) {
    in_tiles<TILE>(z.m, [&](auto M, int64_t first) {
      constexpr int count = S * M, padded = (count + L - 1) / L * L;
      Vec<T, L> sums[padded] = {};
      for (int64_t v = 0; v < 2 * z.pairs; ++v) {
        Vec<T, L> weight[M()];
#pragma GCC unroll 4
        for (int k = 0; k < M; ++k) weight[k] = load<T, L>(w + v / 2 * z.stride + (2 * (first + k) + v % 2) * L);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          const auto value = load<T, L>(p + (row + s) * z.width + v * L);
#pragma GCC unroll 4
          for (int k = 0; k < M; ++k) sums[s * M + k] += weight[k] * value;
        }
      }
      T found[padded];
      if constexpr (count <= 4) {
        for (int i = 0; i < count; ++i) found[i] = sum_lanes<T, L>(sums[i]);
      } else {
        for (int i = 0; i < padded; i += L) store<T, L>(found + i, sums_of<T, L>(sums + i));
      }
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int k = 0; k < M; ++k) y[(row + s) * z.m + first + k] = found[s * M + k];
    });
  });
}

// The same with neighbouring latent units in the lanes, w[h][across]: no sums over lanes, weights are read in order.
template <class T, int L> void reduce_across(const Sizes &z, int64_t rows, const T *w, const T *p, T *y) {
  in_grid(rows, z.across / (2 * L), [&](auto S, int64_t row, auto P, int64_t pair) {
    constexpr int V = 2 * P;
    Vec<T, L> sums[S()][V] = {};
    for (int64_t j = 0; j < z.h; ++j) {
      Vec<T, L> weight[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) weight[v] = load<T, L>(w + j * z.across + (2 * pair + v) * L);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const Vec<T, L> value = every<T, L>(p[(row + s) * z.width + j]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[s][v] += weight[v] * value;
      }
    }
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) {
        const int64_t first = (2 * pair + v) * L, left = z.m - first;
        if (left > 0) store<T, L>(y + (row + s) * z.m + first, sums[s][v], left < L ? left : L);
      }
  });
}

// c[h][m] += sum over rows of p[row][h] x[row][m]
template <class T, int L> void outer(const Sizes &z, int64_t rows, const T *p, const T *x, T *c) {
  for (int64_t pair = 0; pair < z.pairs; ++pair)
    in_tiles<2 * TILE>(z.m, [&](auto M, int64_t first) {
      Vec<T, L> sums[M()][2] = {};
      for (int64_t row = 0; row < rows; ++row) {
        const T *from = p + row * z.width + 2 * pair * L;
        const Vec<T, L> left = load<T, L>(from), right = load<T, L>(from + L);
#pragma GCC unroll 8
        for (int k = 0; k < M; ++k) {
          const Vec<T, L> value = every<T, L>(x[row * z.m + first + k]);
          sums[k][0] += left * value;
          sums[k][1] += right * value;
        }
      }
      T *to = c + pair * z.stride + 2 * first * L;
      for (int i = 0; i < 2 * M; ++i, to += L) store<T, L>(to, load<T, L>(to) + sums[i / 2][i % 2]);
    });
}

template <class T, int L> struct Worker {
  const Arguments<T> &args;
  const int64_t *plan = args.plan;
  const Sizes z{plan, L};
  int64_t group = -1, first = 0, rows = 0, n = 0;  // the block: samples [first, first + rows), n numbers
  T *w1, *w2, *h2, *across, *free, *blend, *keep, *a, *h1, *state, *y;

  Worker(const Arguments<T> &arguments, T *scratch) : args(arguments) {
    w1 = scratch, w2 = w1 + z.pairs * z.stride, h2 = w2 + z.pairs * z.stride;
    across = h2 + 2 * z.pairs * L;
    T *at = scratch + z.weights;
    for (T **part : {&blend, &keep, &a, &h1, &state, &y}) *part = at, at += z.elements();
    free = at;  // what the pass itself needs
  }

  void enter(int64_t g, int64_t block) {
    if (g != group) pack(g);
    first = block * z.rows;
    rows = plan[BATCH] - first < z.rows ? plan[BATCH] - first : z.rows;
    n = rows * z.m;
    for (int64_t i = 0; i < n; ++i) a[i] = args.a[g * z.m + i % z.m], h1[i] = args.h1[g * z.m + i % z.m];
    if (args.forcing != nullptr && plan[ALPHA_T] == 0) read_alpha(0);
  }
  void pack(int64_t g) {
    group = g;
    std::memset(w1, 0, z.weights * sizeof(T));
    const T *from1 = args.w1 + g * z.m * z.h, *from2 = args.w2 + g * z.h * z.m;
    const bool back = args.d_z != nullptr;
    for (int64_t j = 0; j < z.h; ++j) {
      h2[j] = args.h2[g * z.h + j];
      for (int64_t k = 0; k < z.m; ++k) {
        const T one = from1[k * z.h + j], two = from2[j * z.m + k];
        w1[z.place(j, k, L)] = one;
        w2[z.place(j, k, L)] = two;
        if (z.across) across[j * z.across + k] = back ? two : one;
      }
    }
  }
  void reduced(const T *w, const T *hidden) {  // y from hidden values and W1 on the way forward, W2 on the way back
    if (z.across) reduce_across<T, L>(z, rows, across, hidden, y);
    else reduce<T, L>(z, rows, w, hidden, y);
  }
  void read_alpha(int64_t step) {
    const T *from = args.alpha + group * plan[ALPHA_G] + step * plan[ALPHA_T] + first * plan[ALPHA_B];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < z.m; ++k) blend[r * z.m + k] = from[r * plan[ALPHA_B] + k * plan[ALPHA_M]];
    for (int64_t i = 0; i < n; ++i) keep[i] = T(1) - blend[i];
  }
  int64_t at(int64_t step, int64_t steps) const { return ((group * steps + step) * plan[BATCH] + first) * z.m; }
  int64_t begin() const { return (group * plan[BATCH] + first) * z.m; }

  void force(int64_t step, const T *from, T *to) {  // the forced state after `step`
    if (args.forcing == nullptr) return void(std::memcpy(to, from, n * sizeof(T)));
    if (plan[ALPHA_T] != 0) read_alpha(step);
    const T *signal = args.forcing + at(step, plan[STEPS]);
    for (int64_t i = 0; i < n; ++i) {  // a signal without weight may be NaN
      const T mixed = keep[i] * from[i] + blend[i] * signal[i];
      to[i] = blend[i] == T(0) ? from[i] : mixed;
    }
  }
  // Lanes beyond the last hidden unit: infinite states would make NaN of their zero weights.
  void clear_rest(T *hidden) const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = z.h; j < 2 * z.pairs * L; ++j) hidden[row * z.width + j] = T(0);
  }

  template <bool CLIP> void advance(T *hidden) {  // y from state, without inputs
    in_grid(rows, z.pairs, [&](auto S, int64_t row, auto P, int64_t pair) {
      constexpr int V = 2 * P;
      const int64_t vector = 2 * pair;
      Vec<T, L> sums[S()][V] = {};
      expand<T, L, S, V>(w2 + pair * z.stride, z.stride, z.m, state + row * z.m, sums);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T, L> shift = load<T, L>(h2 + (vector + v) * L);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
          Vec<T, L> phi = relu<T, L>(sums[s][v] + shift);
          if constexpr (CLIP) phi -= relu<T, L>(sums[s][v]);
          store<T, L>(hidden + (row + s) * z.width + (vector + v) * L, phi);
        }
      }
    });
    clear_rest(hidden);
    reduced(w1, hidden);
    for (int64_t i = 0; i < n; ++i) y[i] += a[i] * state[i] + h1[i];
  }

  template <bool CLIP> void forward() {
    T *hidden = free;
    const int64_t stored = plan[STEPS] / plan[EVERY];
    std::memcpy(state, args.z1 + begin(), n * sizeof(T));
    for (int64_t k = 0, due = plan[EVERY]; k < stored * plan[EVERY]; ++k) {
      advance<CLIP>(hidden);
      if (args.inputs != nullptr) {
        const T *input = args.inputs + at(k, plan[STEPS]);
        for (int64_t i = 0; i < n; ++i) y[i] += input[i];
      }
      if (--due == 0) {
        std::memcpy(args.z + at(k / plan[EVERY], stored), y, n * sizeof(T));
        due = plan[EVERY];
      }
      force(k, y, state);
    }
  }

  template <bool CLIP> void backward(T *gradients) {
    const int64_t size = z.elements();
    T *back = free, *sum_a = back + size, *sum_h1 = sum_a + size, *debts = sum_h1 + size;
    T *states = debts + z.kept * size, *phis = states + z.kept * size, *debts2 = phis + rounded(z.kept * z.rows * z.width);
    T *d_w1 = gradients, *d_w2 = d_w1 + z.pairs * z.stride, *d_h2 = d_w2 + z.pairs * z.stride;
    std::memset(back, 0, 3 * size * sizeof(T));
    int64_t slot = 0;
    for (int64_t k = plan[STEPS] - 1; k >= 0; --k) {
      T *debt = debts + slot * n, *from = states + slot * n;
      const T *given = args.d_z + at(k, plan[STEPS]);
      if (k == plan[STEPS] - 1) std::memcpy(debt, given, n * sizeof(T));
      else if (args.forcing == nullptr) for (int64_t i = 0; i < n; ++i) debt[i] = given[i] + back[i];
      else for (int64_t i = 0; i < n; ++i) debt[i] = given[i] + keep[i] * back[i];  // keep: of the step last forced
      if (args.d_inputs != nullptr) std::memcpy(args.d_inputs + at(k, plan[STEPS]), debt, n * sizeof(T));
      if (k > 0) force(k - 1, args.z + at(k - 1, plan[STEPS]), from);
      else std::memcpy(from, args.z1 + begin(), n * sizeof(T));
      for (int64_t i = 0; i < n; ++i) sum_a[i] += debt[i] * from[i], sum_h1[i] += debt[i];
      const int64_t base = slot * rows * z.width;
      retreat<CLIP>(from, debt, phis + base, debts2 + base, d_h2);
      reduced(w2, debts2 + base);
      for (int64_t i = 0; i < n; ++i) back[i] = a[i] * debt[i] + y[i];
      if (++slot == z.kept || k == 0) {
        outer<T, L>(z, slot * rows, phis, debts, d_w1);
        outer<T, L>(z, slot * rows, debts2, states, d_w2);
        slot = 0;
      }
    }
    std::memcpy(args.d_z1 + begin(), back, n * sizeof(T));
    T *d_a = d_h2 + 2 * z.pairs * L, *d_h1 = d_a + z.m;
    for (int64_t i = 0; i < n; ++i) d_a[i % z.m] += sum_a[i], d_h1[i % z.m] += sum_h1[i];
  }
  // phi and the debts before the activation, of one step
  template <bool CLIP> INLINE void retreat(const T *from, const T *debt, T *phis, T *debts2, T *d_h2) {
    in_grid(rows, z.pairs, [&](auto S, int64_t row, auto P, int64_t pair) {
      constexpr int V = 2 * P;
      const int64_t vector = 2 * pair;
      {
        Vec<T, L> sums[S()][V] = {};
        expand<T, L, S, V>(w2 + pair * z.stride, z.stride, z.m, from + row * z.m, sums);
        for (int s = 0; s < S; ++s)
          for (int v = 0; v < V; ++v) store<T, L>(phis + (row + s) * z.width + (vector + v) * L, sums[s][v]);
      }
      Vec<T, L> owed[S()][V] = {};
      expand<T, L, S, V>(w1 + pair * z.stride, z.stride, z.m, debt + row * z.m, owed);
      const Vec<T, L> zero{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T, L> shift = load<T, L>(h2 + (vector + v) * L);
        Vec<T, L> sum = load<T, L>(d_h2 + (vector + v) * L);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
          T *phi_at = phis + (row + s) * z.width + (vector + v) * L;
          const Vec<T, L> u = load<T, L>(phi_at), shifted = u + shift;
          Vec<T, L> phi = relu<T, L>(shifted), debt2 = shifted <= zero ? zero : owed[s][v];
          sum += debt2;
          if constexpr (CLIP) {
            phi -= relu<T, L>(u);
            debt2 -= u <= zero ? zero : owed[s][v];
          }
          store<T, L>(phi_at, phi);
          store<T, L>(debts2 + (row + s) * z.width + (vector + v) * L, debt2);
        }
        store<T, L>(d_h2 + (vector + v) * L, sum);
      }
    });
    clear_rest(debts2);
  }
};

template <class T> void run_forward(const Arguments<T> &args) {
  constexpr int L = WIDEST_BYTES / sizeof(T);
  const Sizes z(args.plan, L);
  parallel_for(args.plan[GROUPS] * z.blocks, args.plan[THREADS], [&](int64_t id, int64_t begin, int64_t end) {
    Worker<T, L> worker(args, args.scratch + id * z.forward());
    for (int64_t job = begin; job < end; ++job) {
      worker.enter(job / z.blocks, job % z.blocks);
      if (args.plan[CLIPPED]) worker.template forward<true>();
      else worker.template forward<false>();
    }
  });
}

template <class T> void run_backward(const Arguments<T> &args) {
  constexpr int L = WIDEST_BYTES / sizeof(T);
  const Sizes z(args.plan, L);
  T *partial = args.scratch + args.plan[THREADS] * z.backward();
  parallel_for(args.plan[GROUPS] * z.parts, args.plan[THREADS], [&](int64_t id, int64_t begin, int64_t end) {
    Worker<T, L> worker(args, args.scratch + id * z.backward());
    for (int64_t job = begin; job < end; ++job) {
      const int64_t g = job / z.parts, part = job % z.parts;
      T *gradients = partial + job * z.gradients;
      std::memset(gradients, 0, z.gradients * sizeof(T));
      for (int64_t b = z.blocks * part / z.parts; b < z.blocks * (part + 1) / z.parts; ++b) {
        worker.enter(g, b);
        if (args.plan[CLIPPED]) worker.template backward<true>(gradients);
        else worker.template backward<false>(gradients);
      }
    }
  });
  for (int64_t g = 0; g < args.plan[GROUPS]; ++g) {
    T *total = partial + g * z.parts * z.gradients;
    for (int64_t part = 1; part < z.parts; ++part)
      for (int64_t i = 0; i < z.gradients; ++i) total[i] += total[part * z.gradients + i];
    const T *d_w1 = total, *d_w2 = d_w1 + z.pairs * z.stride, *d_h2 = d_w2 + z.pairs * z.stride;
    const T *d_a = d_h2 + 2 * z.pairs * L, *d_h1 = d_a + z.m;
    for (int64_t k = 0; k < z.m; ++k) {
      args.d_a[g * z.m + k] = d_a[k], args.d_h1[g * z.m + k] = d_h1[k];
      for (int64_t j = 0; j < z.h; ++j) {
        const int64_t from = z.place(j, k, L);
        args.d_w1[(g * z.m + k) * z.h + j] = d_w1[from];
        args.d_w2[(g * z.h + j) * z.m + k] = d_w2[from];
      }
    }
    for (int64_t j = 0; j < z.h; ++j) args.d_h2[g * z.h + j] = d_h2[j];
  }
}

template <class T, class... Pointers> Arguments<T> typed(const int64_t *plan, Pointers... pointers) {
  return Arguments<T>{plan, static_cast<T *>(pointers)...};
}

}  // namespace

extern "C" {

// Fills in the sizes of scratch.
void plrnn_plan(int64_t *plan) {
  const Sizes z(plan, WIDEST_BYTES / plan[BYTES]);
  plan[FORWARD_SCRATCH] = plan[THREADS] * z.forward();
  plan[BACKWARD_SCRATCH] = plan[THREADS] * z.backward() + plan[GROUPS] * z.parts * z.gradients;
}

void plrnn_forward(const int64_t *plan, void *z1, void *forcing, void *alpha, void *a, void *w1, void *w2, void *h1,
                   void *h2, void *inputs, void *scratch, void *z) {
  if (plan[BYTES] == 4) run_forward(typed<float>(plan, z1, forcing, alpha, a, w1, w2, h1, h2, inputs, scratch, z));
  else run_forward(typed<double>(plan, z1, forcing, alpha, a, w1, w2, h1, h2, inputs, scratch, z));
}

// z: the result of the forward pass; d_inputs may be null.
void plrnn_backward(const int64_t *plan, void *z1, void *forcing, void *alpha, void *a, void *w1, void *w2, void *h1,
                    void *h2, void *inputs, void *scratch, void *z, void *d_z, void *d_z1, void *d_inputs, void *d_a,
                    void *d_w1, void *d_w2, void *d_h1, void *d_h2) {
  void *none = nullptr;
  if (plan[BYTES] == 4) run_backward(typed<float>(plan, z1, forcing, alpha, a, w1, w2, h1, h2, inputs, scratch, z, d_z,
                                                  d_z1, d_inputs, none, d_a, d_w1, d_w2, d_h1, d_h2));
  else run_backward(typed<double>(plan, z1, forcing, alpha, a, w1, w2, h1, h2, inputs, scratch, z, d_z, d_z1, d_inputs,
                                  none, d_a, d_w1, d_w2, d_h1, d_h2));
}

}  // extern "C"
