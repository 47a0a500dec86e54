// Kernels of diagonal systems, K[m, h, l] = 2 Re sum_n w[m, h, n] a[h, n]^l, and their adjoint, by the two levels of
// vandermonde.py: lag l = j s + i, so a^l = (a^s)^j a^i. Powers are multiplied up in double from one given a; what is
// left is a small real matrix product a feature, [jumps, 2n] x [2n, s], in the working precision. Features are
// independent: threads take whole ones and results do not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace {

constexpr int kStrip = 32;  // columns of a product handled at once: whole vectors in either precision
constexpr int kRows = 4;    // and rows: enough sums under way to hide the latency of one

struct Sizes {
  int64_t channels, features, modes, length, block, jumps;
};

// What one thread needs again for every feature.
template <class T>
struct Scratch {
  std::vector<double> re, im, step_re, step_im;  // [n] powers under way
  std::vector<T> fine;                           // [2n, s]: real and imaginary part of a^i
  std::vector<T> rows;                           // [jumps, 2n]
  std::vector<T> out;                            // [jumps, s] or [jumps, 4n]
  explicit Scratch(const Sizes &z)
      : re(z.modes), im(z.modes), step_re(z.modes), step_im(z.modes), fine(2 * z.modes * z.block),
        rows(z.jumps * 2 * z.modes), out(z.jumps * std::max(z.block, 4 * z.modes)) {}
};

inline void start(std::vector<double> &re, std::vector<double> &im) {
  std::fill(re.begin(), re.end(), 1.0);
  std::fill(im.begin(), im.end(), 0.0);
}

inline void advance(double *re, double *im, const double *by_re, const double *by_im, int64_t modes) {
  for (int64_t n = 0; n < modes; ++n) {
    const double r = re[n] * by_re[n] - im[n] * by_im[n];
    im[n] = re[n] * by_im[n] + im[n] * by_re[n];
    re[n] = r;
  }
}

// Fills the table of a^i for i < s and leaves a^s in (step_re, step_im).
template <class T>
void fine_table(const double *a_re, const double *a_im, const Sizes &z, Scratch<T> &s) {
  start(s.step_re, s.step_im);
  for (int64_t i = 0; i < z.block; ++i) {
    T *re = s.fine.data() + i, *im = s.fine.data() + z.modes * z.block + i;
    for (int64_t n = 0; n < z.modes; ++n) {
      re[n * z.block] = T(s.step_re[n]);
      im[n * z.block] = T(s.step_im[n]);
    }
    advance(s.step_re.data(), s.step_im.data(), a_re, a_im, z.modes);
  }
}

template <class T>
struct Vector {  // 64 bytes; a compiler for narrower units splits it
  typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int size = 64 / sizeof(T);
};

// out[j, i] = sum_c rows[j, c] table[c, i] for R rows and `width` columns, a multiple of kStrip.
template <class T, int R>
inline void product_rows(const T *rows, const T *table, T *out, int64_t inner, int64_t width) {
  using V = typename Vector<T>::type;
  constexpr int count = kStrip / Vector<T>::size;
  for (int64_t first = 0; first < width; first += kStrip) {
    V sum[R][count] = {};
    for (int64_t c = 0; c < inner; ++c) {
      const V *line = reinterpret_cast<const V *>(table + c * width + first);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < count; ++k) sum[r][k] += rows[r * inner + c] * line[k];
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < count; ++k) reinterpret_cast<V *>(out + r * width + first)[k] = sum[r][k];
  }
}

template <class T>
void product(const T *rows, const T *table, T *out, int64_t count, int64_t inner, int64_t width) {
  int64_t j = 0;
  for (; j + kRows <= count; j += kRows)
    product_rows<T, kRows>(rows + j * inner, table, out + j * width, inner, width);
  for (; j < count; ++j) product_rows<T, 1>(rows + j * inner, table, out + j * width, inner, width);
}

template <class T>
void forward_feature(int64_t h, const double *a_re, const double *a_im, const T *w_re, const T *w_im, T *kernel,
                     const Sizes &z, Scratch<T> &s) {
  fine_table<T>(a_re + h * z.modes, a_im + h * z.modes, z, s);
  for (int64_t m = 0; m < z.channels; ++m) {
    const T *re = w_re + (m * z.features + h) * z.modes, *im = w_im + (m * z.features + h) * z.modes;
    start(s.re, s.im);
    for (int64_t j = 0; j < z.jumps; ++j) {
      T *row = s.rows.data() + j * 2 * z.modes;
      for (int64_t n = 0; n < z.modes; ++n) {
        row[n] = T(2.0 * (re[n] * s.re[n] - im[n] * s.im[n]));
        row[z.modes + n] = T(-2.0 * (re[n] * s.im[n] + im[n] * s.re[n]));
      }
      advance(s.re.data(), s.im.data(), s.step_re.data(), s.step_im.data(), z.modes);
    }
    product<T>(s.rows.data(), s.fine.data(), s.out.data(), z.jumps, 2 * z.modes, z.block);
    std::copy_n(s.out.data(), z.length, kernel + (m * z.features + h) * z.length);
  }
}

// With S = sum_l g_l a^l and T = sum_l l g_l a^l of a kernel's gradient g: dw = (2 Re S, -2 Im S) and, of log a,
// (2 Re w T, -2 Im w T) summed over channels.
template <class T>
void backward_feature(int64_t h, const double *a_re, const double *a_im, const T *w_re, const T *w_im, const T *grad,
                      T *dw_re, T *dw_im, double *dlog_re, double *dlog_im, const Sizes &z, Scratch<T> &s,
                      std::vector<T> &table, std::vector<T> &padded) {
  const int64_t modes = z.modes, width = (4 * modes + kStrip - 1) / kStrip * kStrip;
  start(s.step_re, s.step_im);
  for (int64_t i = 0; i < z.block; ++i) {  // [s, 4n]: a^i and i a^i
    T *line = table.data() + i * width;
    for (int64_t n = 0; n < modes; ++n) {
      line[n] = T(s.step_re[n]);
      line[modes + n] = T(s.step_im[n]);
      line[2 * modes + n] = T(double(i) * s.step_re[n]);
      line[3 * modes + n] = T(double(i) * s.step_im[n]);
    }
    advance(s.step_re.data(), s.step_im.data(), a_re + h * modes, a_im + h * modes, modes);
  }
  double *log_re = dlog_re + h * modes, *log_im = dlog_im + h * modes;
  std::fill_n(log_re, modes, 0.0);
  std::fill_n(log_im, modes, 0.0);
  std::vector<double> &far_re = s.re, &far_im = s.im;
  std::vector<double> total(4 * modes);
  for (int64_t m = 0; m < z.channels; ++m) {
    std::copy_n(grad + (m * z.features + h) * z.length, z.length, padded.data());
    product<T>(padded.data(), table.data(), s.out.data(), z.jumps, z.block, width);
    start(far_re, far_im);
    std::fill(total.begin(), total.end(), 0.0);
    double *s_re = total.data(), *s_im = s_re + modes, *t_re = s_im + modes, *t_im = t_re + modes;
    for (int64_t j = 0; j < z.jumps; ++j) {
      const T *u_re = s.out.data() + j * width, *u_im = u_re + modes, *v_re = u_im + modes, *v_im = v_re + modes;
      const double passed = double(j * z.block);
      for (int64_t n = 0; n < modes; ++n) {
        const double fr = far_re[n], fi = far_im[n];
        const double x = v_re[n] + passed * u_re[n], y = v_im[n] + passed * u_im[n];
        s_re[n] += fr * u_re[n] - fi * u_im[n];
        s_im[n] += fr * u_im[n] + fi * u_re[n];
        t_re[n] += fr * x - fi * y;
        t_im[n] += fr * y + fi * x;
      }
      advance(far_re.data(), far_im.data(), s.step_re.data(), s.step_im.data(), modes);
    }
    const int64_t at = (m * z.features + h) * modes;
    for (int64_t n = 0; n < modes; ++n) {
      dw_re[at + n] = T(2.0 * s_re[n]);
      dw_im[at + n] = T(-2.0 * s_im[n]);
      log_re[n] += 2.0 * (w_re[at + n] * t_re[n] - w_im[at + n] * t_im[n]);
      log_im[n] -= 2.0 * (w_re[at + n] * t_im[n] + w_im[at + n] * t_re[n]);
    }
  }
}

template <class T>
void forward(const double *a_re, const double *a_im, const T *w_re, const T *w_im, T *kernel, const Sizes &z,
             int64_t threads) {
  parallel_for(z.features, threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<T> scratch(z);
    for (int64_t h = begin; h < end; ++h) forward_feature<T>(h, a_re, a_im, w_re, w_im, kernel, z, scratch);
  });
}

template <class T>
void backward(const double *a_re, const double *a_im, const T *w_re, const T *w_im, const T *grad, T *dw_re, T *dw_im,
              double *dlog_re, double *dlog_im, const Sizes &z, int64_t threads) {
  const int64_t width = (4 * z.modes + kStrip - 1) / kStrip * kStrip;
  parallel_for(z.features, threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<T> scratch(z);
    scratch.out.resize(z.jumps * width);
    std::vector<T> table(z.block * width), padded(z.jumps * z.block);
    for (int64_t h = begin; h < end; ++h)
      backward_feature<T>(h, a_re, a_im, w_re, w_im, grad, dw_re, dw_im, dlog_re, dlog_im, z, scratch, table, padded);
  });
}

}  // namespace

// a [H, n] double; w [M, H, n]; kernel and its gradient [M, H, L]; block a multiple of 32, jumps * block >= L.
#define ENTRIES(T, SUFFIX)                                                                                            \
  extern "C" void vandermonde_forward_##SUFFIX(const double *a_re, const double *a_im, const T *w_re, const T *w_im,  \
                                               T *kernel, int64_t channels, int64_t features, int64_t modes,         \
                                               int64_t length, int64_t block, int64_t jumps, int64_t threads) {      \
    forward<T>(a_re, a_im, w_re, w_im, kernel, {channels, features, modes, length, block, jumps}, threads);           \
  }                                                                                                                   \
  extern "C" void vandermonde_backward_##SUFFIX(                                                                      \
      const double *a_re, const double *a_im, const T *w_re, const T *w_im, const T *grad, T *dw_re, T *dw_im,        \
      double *dlog_re, double *dlog_im, int64_t channels, int64_t features, int64_t modes, int64_t length,            \
      int64_t block, int64_t jumps, int64_t threads) {                                                                \
    backward<T>(a_re, a_im, w_re, w_im, grad, dw_re, dw_im, dlog_re, dlog_im,                                         \
                {channels, features, modes, length, block, jumps}, threads);                                          \
  }
ENTRIES(float, f32)
ENTRIES(double, f64)
