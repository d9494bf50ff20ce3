// Products of few tokens. The bytes of w are read once and are all that counts; the goal is the speed of memory. A thread walks
// through its piece of the rows at several places at once, each of which goes on in memory to its end: streams that the
// hardware fetches ahead.
#pragma once
#include "weights_f16.h"
#include "weights_grouped.h"

namespace moss {

// y[t, n] for rows n of w in [first, end), T tokens, rows of y N long; then finish (linear.h). In halves.
template <int T, class Finish>
void few(const WeightsF16& w, Floats x, float* y, int64_t first, int64_t end, int64_t N, Finish finish) {
    const int R = T <= 6 ? 4 : 2;  // streams, as far as registers hold their sums
    const int64_t piece = std::max<int64_t>(4 * R, (1 << 20) / w.row_bytes() / R * R);
#pragma omp parallel for schedule(dynamic)
    for (int64_t n0 = first; n0 < end; n0 += piece) {
        const int64_t n1 = std::min(end, n0 + piece), apart = (n1 - n0) / R;
        for (int64_t n = n0; n < n0 + apart; n++) {
            float sums[R][T];
            w.few<R, T>(x, n, apart, sums);
            for (int r = 0; r < R; r++)
                for (int t = 0; t < T; t++) y[t * N + n + r * apart] = sums[r][t];
        }
        for (int64_t n = n0 + R * apart; n < n1; n++) {
            float sums[1][T];
            w.few<1, T>(x, n, 0, sums);
            for (int t = 0; t < T; t++) y[t * N + n] = sums[0][t];
        }
        for (int t = 0; t < T; t++) finish(y + t * N + n0, t, n0, n1 - n0);
    }
}

// In 8 or 4 bits: R panels from `panel` on, `apart` from each other, for all tokens, a block after the other.
template <int R, int BLOCK, class W>
inline void few_panels(const W& w, const Sixteen& x, int64_t panel, int64_t apart, float* y, int64_t end, int64_t N) {
    for (int64_t b = 0; b < x.blocks(); b++)
        with_constant<BLOCK>(x.width(b), [&](auto width) {
            const int T = decltype(width)::value;
            float sums[T][PANEL * R];
            w.template few<R, T>(x, b, panel, apart, sums);
            for (int t = 0; t < T; t++)
                for (int r = 0; r < R; r++) {
                    const int64_t n = (panel + r * apart) * PANEL;
                    std::copy_n(sums[t] + PANEL * r, std::min<int64_t>(PANEL, end - n), y + (b * BLOCK + t) * N + n);
                }
        });
}

template <int BLOCK, int BITS, class Finish>
void few(const WeightsGrouped<BITS>& w, const Sixteen& x, float* y, int64_t first, int64_t end, int64_t N, Finish finish) {
    const int R = LANES == 1 ? 2 : 1;
    const int64_t panels = (end + PANEL - 1) / PANEL;
    const int64_t piece = std::max<int64_t>(2, (1 << 20) / (PANEL * w.row_bytes()) / R * R);
#pragma omp parallel for schedule(dynamic)
    for (int64_t p0 = first / PANEL; p0 < panels; p0 += piece) {
        const int64_t p1 = std::min(panels, p0 + piece), apart = (p1 - p0) / R;
        for (int64_t p = p0; p < p0 + apart; p++) few_panels<R, BLOCK>(w, x, p, apart, y, end, N);
        for (int64_t p = p0 + R * apart; p < p1; p++) few_panels<1, BLOCK>(w, x, p, 0, y, end, N);
        const int64_t n = p0 * PANEL, count = std::min(end, p1 * PANEL) - n;
        for (int64_t t = 0; t < x.T; t++) finish(y + t * N + n, t, n, count);
    }
}

}  // namespace moss
