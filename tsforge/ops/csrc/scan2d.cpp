// The 2-D selective scan and its adjoint, one lane per (batch, channel, state), sequential over the grid.
//
// Roles. The longer grid axis is walked in the outer loop, so that the carried states fit a cache: "o" marks the state
// that moves along it, "i" the state that moves along the inner axis,
//     o[c] += g_o (a0 o[before] + a1 i[before] + b_o x),   before = the cell one outer step back
//     i[c] += g_i (a2 o[above]  + a3 i[above]  + b_i x),   above = the cell one inner step back
// with g = expm1(step * a) / a, a = a0 and a3. The caller exchanges the two families when variates outnumber steps.
//
// Lanes are neighbouring channels of one group; states are a loop inside a cell. B and C are then one number for all
// lanes and y needs no sum over lanes. Arrays of states have one slot more than the inner axis: slot 0 is the edge.
//
// Complex numbers: everything here is holomorphic; the caller conjugates gradients on the way in and out.
#include "lanes.h"
#include "parallel.h"

namespace {

enum Plan {
  BATCH, OUTER, INNER, GROUPS, CHANNELS, STATES, OUTER_STRIDE, INNER_STRIDE,  // grid strides in cells; channels a group
  SWAPPED, BYTES, PARTS, THREADS,  // edges hold (i, o) instead of (o, i); bytes of a real; 2 parts if complex
  CELL_STRIDE, GROUP_STRIDE,       // of B and C in reals; their gradients are contiguous
  ONE_SIDED,                       // the states i are 0 everywhere and nothing reads them: they are left out
  LANES, INTERVAL, CHECKPOINTS, FORWARD_SCRATCH, BACKWARD_SCRATCH,  // out: sizes in reals; an interval may be given
};

constexpr int64_t CACHE_BYTES = 384 << 10;  // of a second-level cache, without a large share

int64_t blocks_of(const int64_t *plan, int64_t lanes) { return (plan[CHANNELS] + lanes - 1) / lanes; }

// A forward job is a block of channels. A backward job is all channels of a group, in order: they add to the same
// gradients of B and C.
int64_t jobs_of(const int64_t *plan, bool backward) {
  return plan[BATCH] * plan[GROUPS] * (backward ? 1 : blocks_of(plan, plan[LANES]));
}

int64_t threads_of(const int64_t *plan, bool backward) {
  const int64_t jobs = jobs_of(plan, backward);
  return jobs < plan[THREADS] ? jobs : plan[THREADS];
}

template <class T> struct Arguments {  // of both passes; what a pass does not use is null
  const int64_t *plan;
  const T *x, *step_o, *step_i, *a, *b_o, *b_i, *c_o, *c_i, *edge_o, *edge_i;
  T *checkpoints, *scratch;
  T *y = nullptr, *end_o = nullptr, *end_i = nullptr;
  const T *d_y = nullptr, *d_end_o = nullptr, *d_end_i = nullptr;
  T *d_x = nullptr, *d_step_o = nullptr, *d_step_i = nullptr, *d_a = nullptr;
  T *d_b_o = nullptr, *d_b_i = nullptr, *d_c_o = nullptr, *d_c_i = nullptr, *d_edge_o = nullptr, *d_edge_i = nullptr;
};

// What one block of channels of one batch element and group sees.
template <class N> struct Block {
  using T = typename N::Scalar;
  static constexpr int64_t number = N::parts * N::lanes;  // reals of one number of all lanes
  const Arguments<T> &args;
  const int64_t *plan = args.plan;
  int64_t batch, group, index, first, count;  // channels [first, first + count)
  const int64_t states = plan[STATES], inner = plan[INNER], width = plan[GROUPS] * plan[CHANNELS];
  const int64_t slot = states * 2 * number, column = (inner + 1) * slot;

  Block(const Arguments<T> &arguments, int64_t b, int64_t g, int64_t j)
      : args(arguments), batch(b), group(g), index(j), first(g * arguments.plan[CHANNELS] + j * N::lanes),
        count(arguments.plan[CHANNELS] - j * N::lanes < N::lanes ? arguments.plan[CHANNELS] - j * N::lanes : N::lanes) {}

  int64_t cell(int64_t o, int64_t i) const {
    return batch * plan[OUTER] * inner + o * plan[OUTER_STRIDE] + i * plan[INNER_STRIDE];
  }
  int64_t at(int64_t cell) const { return cell * width + first; }                                      // x, steps, y
  int64_t shared(int64_t cell) const { return cell * plan[CELL_STRIDE] + group * plan[GROUP_STRIDE]; }  // B, C
  int64_t d_shared(int64_t cell) const { return (cell * plan[GROUPS] + group) * states * N::parts; }   // their gradients
  int64_t edge(int64_t length, int64_t place) const {                                                  // [b, L, 2, S, p, D]
    return (batch * length + place) * 2 * states * N::parts * width + first;
  }
  T *checkpoint(int64_t segment) const {
    const int64_t segments = (plan[OUTER] - 1) / plan[INTERVAL];  // the first one starts from the edge
    const int64_t block = (batch * plan[GROUPS] + group) * blocks_of(plan, N::lanes) + index;
    return args.checkpoints + (block * segments + segment - 1) * inner * slot;
  }

  // One slot [S, 2, p, L] from or to a place of an edge [2, S, p, D].
  void read_slot(T *to, const T *from) const {
    for (int64_t s = 0; s < states; ++s)
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t p = 0; p < N::parts; ++p)
          store<T, N::lanes>(to + (s * 2 + which) * number + p * N::lanes,
                             load<T, N::lanes>(from + (((which ^ plan[SWAPPED]) * states + s) * N::parts + p) * width, count));
  }
  void write_slot(T *to, const T *from) const {
    for (int64_t s = 0; s < states; ++s)
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t p = 0; p < N::parts; ++p)
          store<T, N::lanes>(to + (((which ^ plan[SWAPPED]) * states + s) * N::parts + p) * width,
                             load<T, N::lanes>(from + (s * 2 + which) * number + p * N::lanes), count);
  }
  void fill(T *slots, int64_t how_many) const { std::memset(slots, 0, how_many * slot * sizeof(T)); }

  // Transitions as [S, 6, p, L] from [6, S, p, D]: a0..a3, 1 / a0, 1 / a3. Lanes without a channel are 0 and stay 0.
  void read_transitions(T *to) const {
    for (int64_t s = 0; s < states; ++s)
      for (int64_t k = 0; k < 6; ++k)
        for (int64_t p = 0; p < N::parts; ++p)
          store<T, N::lanes>(to + (s * 6 + k) * number + p * N::lanes,
                             load<T, N::lanes>(args.a + ((k * states + s) * N::parts + p) * width + first, count));
  }
  void start(T *slots) const {  // slots 1.. of the column before the grid
    if (args.edge_o == nullptr) return fill(slots + slot, inner);
    for (int64_t i = 0; i < inner; ++i) read_slot(slots + (i + 1) * slot, args.edge_o + edge(inner, i));
  }
  void enter_column(T *slots, int64_t o) const {  // slot 0
    if (args.edge_i == nullptr) return fill(slots, 1);
    read_slot(slots, args.edge_i + edge(plan[OUTER], o));
  }
};

// What changes a state, times its gain.
template <class N> INLINE N drive(N a_o, N o, N a_i, N i, N b, typename N::V x) {
  return add_product(add_product(b * x, a_o, o), a_i, i);
}

// States of one cell and, as asked, its output and its gains g_o, g_i. `now` may be `before`. ONE: only the states o.
template <class N, bool ONE, bool OUTPUT>
INLINE typename N::V advance(const Block<N> &block, int64_t cell, const typename N::Scalar *a,
                             const typename N::Scalar *before, const typename N::Scalar *above,
                             typename N::Scalar *now, typename N::Scalar *gains) {
  using T = typename N::Scalar;
  constexpr int64_t n = Block<N>::number;
  const auto &args = block.args;
  const auto x = load<T, N::lanes>(args.x + block.at(cell), block.count);
  const auto step_o = load<T, N::lanes>(args.step_o + block.at(cell), block.count);
  const auto step_i = load<T, N::lanes>(args.step_i + block.at(cell), block.count);
  const int64_t shared = block.shared(cell);
  const T *b_o = args.b_o + shared, *b_i = args.b_i + shared, *c_o = args.c_o + shared, *c_i = args.c_i + shared;
  typename N::V y{};
  for (int64_t s = 0; s < block.states; ++s) {
    const T *as = a + s * 6 * n;
    const N a0 = N::get(as), before_o = N::get(before + 2 * s * n);
    const N g_o = N::expm1_of(a0, step_o) * N::get(as + 4 * n);
    if constexpr (!OUTPUT) g_o.put(gains + 2 * s * n);
    N q_o = add_product(N::same(b_o + s * N::parts) * x, a0, before_o);
    if constexpr (!ONE) {
      const N a3 = N::get(as + 3 * n), above_o = N::get(above + 2 * s * n), above_i = N::get(above + (2 * s + 1) * n);
      const N g_i = N::expm1_of(a3, step_i) * N::get(as + 5 * n);
      if constexpr (!OUTPUT) g_i.put(gains + (2 * s + 1) * n);
      q_o = add_product(q_o, N::get(as + n), N::get(before + (2 * s + 1) * n));
      const N q_i = drive<N>(N::get(as + 2 * n), above_o, a3, above_i, N::same(b_i + s * N::parts), x);
      const N i = add_product(above_i, g_i, q_i);
      if constexpr (OUTPUT) y = add_real_of_product(y, N::same(c_i + s * N::parts), i);
      i.put(now + (2 * s + 1) * n);
    }
    const N o = add_product(before_o, g_o, q_o);
    if constexpr (OUTPUT) y = add_real_of_product(y, N::same(c_o + s * N::parts), o);
    o.put(now + 2 * s * n);
  }
  return y;
}

template <class N, bool ONE> void forward_block(const Block<N> &block, typename N::Scalar *scratch) {
  using T = typename N::Scalar;
  const auto &args = block.args;
  T *a = scratch, *slots = a + block.states * 6 * block.number;
  const int64_t outer = block.plan[OUTER], inner = block.inner, slot = block.slot;
  block.read_transitions(a);
  block.start(slots);
  for (int64_t o = 0; o < outer; ++o) {
    if (args.checkpoints != nullptr && o > 0 && o % block.plan[INTERVAL] == 0)
      std::memcpy(block.checkpoint(o / block.plan[INTERVAL]), slots + slot, inner * slot * sizeof(T));
    block.enter_column(slots, o);
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t cell = block.cell(o, i);
      T *now = slots + (i + 1) * slot;
      const auto y = advance<N, ONE, true>(block, cell, a, now, slots + i * slot, now, nullptr);
      store<T, N::lanes>(args.y + block.at(cell), y, block.count);
    }
    if (args.end_i != nullptr) block.write_slot(args.end_i + block.edge(outer, o), slots + inner * slot);
  }
  if (args.end_o != nullptr)
    for (int64_t i = 0; i < inner; ++i)
      block.write_slot(args.end_o + block.edge(inner, i), slots + (i + 1) * slot);
}

// The adjoint of one cell: `after` and `below` hold what later cells owe this one's neighbours' slots and its own;
// on entry `after` is the debt to this cell, on return the debt to the cell one outer step back, and the debt to the
// cell one inner step back has been added to `below`. ONE: as in `advance`; gradients of what is left out are not written.
template <class N, bool ONE>
INLINE void retreat(const Block<N> &block, int64_t cell, const typename N::Scalar *a,
                    const typename N::Scalar *before, const typename N::Scalar *above, const typename N::Scalar *now,
                    const typename N::Scalar *gains, typename N::Scalar *after, typename N::Scalar *below,
                    typename N::Scalar *d_a, typename N::Scalar *rows) {
  using T = typename N::Scalar;
  constexpr int64_t n = Block<N>::number;
  const auto &args = block.args;
  const int64_t at = block.at(cell), count = block.count, shared = block.shared(cell), many = block.states * n;
  const auto x = load<T, N::lanes>(args.x + at, count), d_y = load<T, N::lanes>(args.d_y + at, count);
  const auto step_o = load<T, N::lanes>(args.step_o + at, count), step_i = load<T, N::lanes>(args.step_i + at, count);
  const T *b_o = args.b_o + shared, *b_i = args.b_i + shared, *c_o = args.c_o + shared, *c_i = args.c_i + shared;
  typename N::V d_x{}, d_step_o{}, d_step_i{};
  for (int64_t s = 0; s < block.states; ++s) {
    const T *as = a + s * 6 * n;
    T *ds = d_a + s * 4 * n, *after_o = after + 2 * s * n, *below_o = below + 2 * s * n;
    const N a0 = N::get(as), bo = N::same(b_o + s * N::parts), before_o = N::get(before + 2 * s * n);
    const N g_o = N::get(gains + 2 * s * n), debt_o = N::get(after_o) + N::same(c_o + s * N::parts) * d_y;
    const N m_o = debt_o * g_o, back_o = m_o * a0;
    N q_o = add_product(bo * x, a0, before_o);
    (m_o * x).put(rows + s * n);
    (N::get(now + 2 * s * n) * d_y).put(rows + many + s * n);
    d_x = add_real_of_product(d_x, m_o, bo);
    (debt_o + back_o).put(after_o);
    if constexpr (!ONE) {
      const N a1 = N::get(as + n), a2 = N::get(as + 2 * n), a3 = N::get(as + 3 * n), bi = N::same(b_i + s * N::parts);
      const N before_i = N::get(before + (2 * s + 1) * n), g_i = N::get(gains + (2 * s + 1) * n);
      const N above_o = N::get(above + 2 * s * n), above_i = N::get(above + (2 * s + 1) * n);
      const N debt_i = N::get(after_o + n) + N::same(c_i + s * N::parts) * d_y, m_i = debt_i * g_i, back_i = m_i * a3;
      q_o = add_product(q_o, a1, before_i);
      const N p_i = debt_i * drive<N>(a2, above_o, a3, above_i, bi, x), pg_i = p_i * g_i;
      const N turned_i = add_product(p_i, pg_i, a3);
      d_step_i += turned_i.re;
      add_product(N::get(ds + n), m_o, before_i).put(ds + n);
      add_product(N::get(ds + 2 * n), m_i, above_o).put(ds + 2 * n);
      add_product(N::get(ds + 3 * n) + turned_i * step_i - pg_i, back_i, above_i).put(ds + 3 * n);
      d_x = add_real_of_product(d_x, m_i, bi);
      (m_o * a1).put(after_o + n);
      add_product(N::get(below_o), m_i, a2).put(below_o);
      (N::get(below_o + n) + debt_i + back_i).put(below_o + n);
      (m_i * x).put(rows + 2 * many + s * n);
      (N::get(now + (2 * s + 1) * n) * d_y).put(rows + 3 * many + s * n);
    }
    // derivatives by the steps: debt q (1 + g a); by a0 and a3 the same times the step, less debt q g, over a, see below
    const N p_o = debt_o * q_o, pg_o = p_o * g_o, turned_o = add_product(p_o, pg_o, a0);
    d_step_o += turned_o.re;
    add_product(N::get(ds) + turned_o * step_o - pg_o, back_o, before_o).put(ds);
  }
  store<T, N::lanes>(args.d_x + at, d_x, count);
  store<T, N::lanes>(args.d_step_o + at, d_step_o, count);
  if constexpr (!ONE) store<T, N::lanes>(args.d_step_i + at, d_step_i, count);
  const int64_t per = block.states * N::parts;
  const int64_t d_shared = block.d_shared(cell);
  T *outs[] = {args.d_b_o + d_shared, args.d_c_o + d_shared, args.d_b_i + d_shared, args.d_c_i + d_shared};
  T *sums = rows + 4 * many;
  constexpr int64_t used = ONE ? 2 : 4;
  sum_rows<T, N::lanes>(rows, used * per, sums);
  for (int64_t k = 0; k < used; ++k)
    for (int64_t s = 0; s < per; ++s) outs[k][s] = block.index > 0 ? outs[k][s] + sums[k * per + s] : sums[k * per + s];
}

template <class N, bool ONE> void backward_block(const Block<N> &block, typename N::Scalar *scratch) {
  using T = typename N::Scalar;
  const auto &args = block.args;
  const int64_t outer = block.plan[OUTER], inner = block.inner, slot = block.slot, column = block.column;
  const int64_t interval = block.plan[INTERVAL], rates = block.states * 4 * block.number;
  T *a = scratch, *history = a + block.states * 6 * block.number;  // interval + 1 columns
  T *gains = history + (interval + 1) * column, *debts = gains + interval * inner * slot;
  T *d_a = debts + column, *total = d_a + rates, *rows = total + rates;
  block.read_transitions(a);
  std::memset(total, 0, rates * sizeof(T));
  block.fill(debts, inner + 1);
  if (args.d_end_o != nullptr)
    for (int64_t i = 0; i < inner; ++i)
      block.read_slot(debts + (i + 1) * slot, args.d_end_o + block.edge(inner, i));
  for (int64_t segment = (outer - 1) / interval; segment >= 0; --segment) {
    const int64_t start = segment * interval, stop = start + interval < outer ? start + interval : outer;
    if (segment == 0) block.start(history);
    else std::memcpy(history + slot, block.checkpoint(segment), inner * slot * sizeof(T));
    for (int64_t o = start; o < stop; ++o) {
      T *past = history + (o - start) * column, *present = past + column;
      block.enter_column(present, o);
      for (int64_t i = 0; i < inner; ++i)
        advance<N, ONE, false>(block, block.cell(o, i), a, past + (i + 1) * slot, present + i * slot,
                          present + (i + 1) * slot, gains + ((o - start) * inner + i) * slot);
    }
    std::memset(d_a, 0, rates * sizeof(T));  // sums of a segment first: shorter chains of roundings
    for (int64_t o = stop - 1; o >= start; --o) {
      const T *past = history + (o - start) * column, *present = past + column;
      if (args.d_end_i != nullptr) {
        T *owed = rows, *last = debts + inner * slot;  // rows are free between cells and large enough
        block.read_slot(owed, args.d_end_i + block.edge(outer, o));
        for (int64_t k = 0; k < slot; ++k) last[k] += owed[k];
      }
      for (int64_t i = inner - 1; i >= 0; --i)
        retreat<N, ONE>(block, block.cell(o, i), a, past + (i + 1) * slot, present + i * slot, present + (i + 1) * slot,
                   gains + ((o - start) * inner + i) * slot, debts + (i + 1) * slot, debts + i * slot, d_a, rows);
      if (args.d_edge_i != nullptr) block.write_slot(args.d_edge_i + block.edge(outer, o), debts);
      block.fill(debts, 1);
    }
    for (int64_t k = 0; k < rates; ++k) total[k] += d_a[k];
  }
  for (int64_t s = 0; s < block.states; ++s) {  // those of a0 and a3 were summed a0 and a3 times too large
    T *ds = total + s * 4 * block.number;
    const T *as = a + s * 6 * block.number;
    (N::get(ds) * N::get(as + 4 * block.number)).put(ds);
    (N::get(ds + 3 * block.number) * N::get(as + 5 * block.number)).put(ds + 3 * block.number);
  }
  if (args.d_edge_o != nullptr)
    for (int64_t i = 0; i < inner; ++i)
      block.write_slot(args.d_edge_o + block.edge(inner, i), debts + (i + 1) * slot);
  T *partial = args.d_a + block.batch * 4 * block.states * N::parts * block.width + block.first;  // [b, 4, S, p, D]
  for (int64_t s = 0; s < block.states; ++s)
    for (int64_t k = 0; k < 4; ++k)
      for (int64_t p = 0; p < N::parts; ++p)
        store<T, N::lanes>(partial + ((k * block.states + s) * N::parts + p) * block.width,
                           load<T, N::lanes>(total + (s * 4 + k) * block.number + p * N::lanes), block.count);
}

template <class N, bool ONE> void run(const Arguments<typename N::Scalar> &args, bool backward) {
  const int64_t *plan = args.plan, blocks = blocks_of(plan, N::lanes), threads = threads_of(plan, backward);
  const int64_t share = plan[backward ? BACKWARD_SCRATCH : FORWARD_SCRATCH] / threads;
  parallel_for(jobs_of(plan, backward), threads, [&](int64_t worker, int64_t begin, int64_t end) {
    typename N::Scalar *scratch = args.scratch + worker * share;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t pair = backward ? job : job / blocks, batch = pair / plan[GROUPS], group = pair % plan[GROUPS];
      if (!backward) forward_block<N, ONE>(Block<N>(args, batch, group, job % blocks), scratch);
      else for (int64_t j = 0; j < blocks; ++j) backward_block<N, ONE>(Block<N>(args, batch, group, j), scratch);
    }
  });
  if (!backward) return;
  const int64_t size = 4 * plan[STATES] * N::parts * plan[GROUPS] * plan[CHANNELS];
  for (int64_t b = 1; b < plan[BATCH]; ++b)
    for (int64_t k = 0; k < size; ++k) args.d_a[k] += args.d_a[b * size + k];
}

template <class T, int L> void run_lanes(const Arguments<T> &args, bool backward) {
  const bool one = args.plan[ONE_SIDED] != 0;
  if (args.plan[PARTS] == 2) one ? run<Complex<T, L>, true>(args, backward) : run<Complex<T, L>, false>(args, backward);
  else one ? run<Real<T, L>, true>(args, backward) : run<Real<T, L>, false>(args, backward);
}

template <class T> void dispatch(const Arguments<T> &args, bool backward) {
  constexpr int most = WIDEST_BYTES / sizeof(T);
  if constexpr (most >= 4) {
    if (args.plan[LANES] < most) return run_lanes<T, most / 2>(args, backward);
  }
  run_lanes<T, most>(args, backward);
}

template <class T, class... Pointers> void typed(bool backward, const int64_t *plan, Pointers... pointers) {
  dispatch(Arguments<T>{plan, static_cast<T *>(pointers)...}, backward);
}

// Lanes that waste least: a block costs about its width plus a quarter of the widest.
int64_t best_lanes(int64_t channels, int64_t most) {
  if (most < 4) return most;
  const auto cost = [=](int64_t lanes) { return (channels + lanes - 1) / lanes * (4 * lanes + most); };
  return cost(most) <= cost(most / 2) ? most : most / 2;
}

}  // namespace

extern "C" {

// Fills in the second half of a plan.
void scan2d_plan(int64_t *plan) {
  const int64_t lanes = best_lanes(plan[CHANNELS], WIDEST_BYTES / plan[BYTES]);
  const int64_t number = lanes * plan[PARTS], slot = plan[STATES] * 2 * number, column = (plan[INNER] + 1) * slot;
  int64_t interval = plan[INTERVAL];
  if (interval <= 0) {  // about the square root: as many checkpoints as columns between two of them; more if a cache
    for (interval = 1; interval * interval < plan[OUTER];) ++interval;  // holds what is computed again
    const int64_t fit = CACHE_BYTES / ((column + plan[INNER] * slot) * plan[BYTES]);
    if (interval < fit) interval = fit < plan[OUTER] ? fit : plan[OUTER];
  }
  const int64_t segments = (plan[OUTER] - 1) / interval;
  plan[LANES] = lanes;
  plan[INTERVAL] = interval;
  plan[CHECKPOINTS] = jobs_of(plan, false) * segments * plan[INNER] * slot;
  plan[FORWARD_SCRATCH] = threads_of(plan, false) * (plan[STATES] * 6 * number + column);
  plan[BACKWARD_SCRATCH] = threads_of(plan, true) * (plan[STATES] * (18 * number + 4 * plan[PARTS]) + (interval + 2) * column +
                                                     interval * plan[INNER] * slot);
}

void scan2d_forward(const int64_t *plan, void *x, void *step_o, void *step_i, void *a, void *b_o, void *b_i,
                    void *c_o, void *c_i, void *edge_o, void *edge_i, void *checkpoints, void *scratch, void *y,
                    void *end_o, void *end_i) {
  if (plan[BYTES] == 4) typed<float>(false, plan, x, step_o, step_i, a, b_o, b_i, c_o, c_i, edge_o, edge_i,
                                     checkpoints, scratch, y, end_o, end_i);
  else typed<double>(false, plan, x, step_o, step_i, a, b_o, b_i, c_o, c_i, edge_o, edge_i, checkpoints, scratch, y,
                     end_o, end_i);
}

// d_a holds one [4, S, p, D] for each batch element; their sum is returned in the first.
void scan2d_backward(const int64_t *plan, void *x, void *step_o, void *step_i, void *a, void *b_o, void *b_i,
                     void *c_o, void *c_i, void *edge_o, void *edge_i, void *checkpoints, void *scratch, void *d_y,
                     void *d_end_o, void *d_end_i, void *d_x, void *d_step_o, void *d_step_i, void *d_a, void *d_b_o,
                     void *d_b_i, void *d_c_o, void *d_c_i, void *d_edge_o, void *d_edge_i) {
  void *none = nullptr;
  if (plan[BYTES] == 4) typed<float>(true, plan, x, step_o, step_i, a, b_o, b_i, c_o, c_i, edge_o, edge_i,
                                     checkpoints, scratch, none, none, none, d_y, d_end_o, d_end_i, d_x, d_step_o,
                                     d_step_i, d_a, d_b_o, d_b_i, d_c_o, d_c_i, d_edge_o, d_edge_i);
  else typed<double>(true, plan, x, step_o, step_i, a, b_o, b_i, c_o, c_i, edge_o, edge_i, checkpoints, scratch,
                     none, none, none, d_y, d_end_o, d_end_i, d_x, d_step_o, d_step_i, d_a, d_b_o, d_b_i, d_c_o,
                     d_c_i, d_edge_o, d_edge_i);
}

}  // extern "C"
