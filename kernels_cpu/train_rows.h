// What training does row by row: norms and gelu with what is needed of them backwards, sums over rows, AdamW. Sums over rows are
// taken by whole columns, so that the order of their terms does not depend on the threads.
#pragma once
#include "inputs.h"

namespace moss {

// A vector that may be learned: gradient is null where it is frozen.
struct Learned {
    float* value;
    float* gradient;
};

const int64_t COLUMNS = 256;  // that a thread sums at a time

// f(first, end) for ranges of columns, shared among threads.
template <class F>
void by_columns(int64_t N, F f) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < N; j += COLUMNS) f(j, std::min(N, j + COLUMNS));
}

// sums[j] += the sum of x[t, j] over T rows.
inline void add_rows(const float* x, int64_t stride, int64_t T, int64_t N, float* sums) {
    by_columns(N, [=](int64_t first, int64_t end) {
        for (int64_t t = 0; t < T; t++)
            for (int64_t j = first; j < end; j++) sums[j] += x[t * stride + j];
    });
}

// y = xhat * weight + bias, xhat = (x - mean) * inverse; stats: (T, 2), each row's mean and inverse deviation.
inline void norm_forward(const float* x, const float* weight, const float* bias, float* y, float* stats, int64_t T, int64_t D,
                         float eps) {
#pragma omp parallel for schedule(static) if (T > 4)
    for (int64_t t = 0; t < T; t++) {
        const float* from = x + t * D;
        float mean = 0, var = 0;
        for (int64_t i = 0; i < D; i++) mean += from[i];
        mean /= D;
        for (int64_t i = 0; i < D; i++) var += (from[i] - mean) * (from[i] - mean);
        const float inverse = 1 / std::sqrt(var / D + eps);
        stats[2 * t] = mean, stats[2 * t + 1] = inverse;
        for (int64_t i = 0; i < D; i++) y[t * D + i] = (from[i] - mean) * inverse * weight[i] + bias[i];
    }
}

// dx = added + the derivative through the norm of dy; gradients of weight and bias grow. dx may be added, or null.
inline void norm_backward(const float* x, const float* stats, Learned weight, Learned bias, const float* dy, const float* added,
                          float* dx, int64_t T, int64_t D) {
    if (weight.gradient)
        by_columns(D, [=](int64_t first, int64_t end) {
            for (int64_t t = 0; t < T; t++) {
                const float mean = stats[2 * t], inverse = stats[2 * t + 1];
                for (int64_t i = first; i < end; i++) weight.gradient[i] += dy[t * D + i] * ((x[t * D + i] - mean) * inverse);
                for (int64_t i = first; i < end; i++) bias.gradient[i] += dy[t * D + i];
            }
        });
#pragma omp parallel for schedule(static) if (T > 4)
    for (int64_t t = 0; t < T; t++) {
        const float *from = x + t * D, *d = dy + t * D, mean = stats[2 * t], inverse = stats[2 * t + 1];
        float sum = 0, dot = 0;
        for (int64_t i = 0; i < D; i++) {
            const float g = d[i] * weight.value[i];
            sum += g, dot += g * ((from[i] - mean) * inverse);
        }
        sum /= D, dot /= D;
        for (int64_t i = 0; i < D; i++) {
            const float hat = (from[i] - mean) * inverse;
            dx[t * D + i] = (added ? added[t * D + i] : 0) + inverse * (d[i] * weight.value[i] - sum - hat * dot);
        }
    }
}

// The derivative of gelu_new at x: s + x s (1 - s) 2u', with s = 1 / (1 + e^(-2u)), 1 - s = e^(-2u) s, and u as in gelu_new.
inline vec gelu_new_slope(vec x) {
    const vec xx = mul(x, x);
    const vec u2 = mul(mul(x, all(1.5957691216f)), fma(xx, all(0.044715f), all(1)));
    const vec e = exp(lower(sub(zero(), u2), all(60.f))), s = div(all(1), add(all(1), e));
    const vec slope = mul(all(1.5957691216f), fma(xx, all(3 * 0.044715f), all(1)));
    return fma(mul(mul(x, s), mul(e, s)), slope, s);
}

// One step of AdamW for n numbers, as torch takes it: shrink is 1 - lr * decay, rate lr / (1 - beta1^t), root sqrt(1 - beta2^t).
// The betas are doubles because 1 - beta2 of floats would be 5e-5 off.
inline void adamw(float* value, const float* gradient, float* m, float* v, int64_t n, float shrink, float rate, float root_,
                  double beta1, double beta2, float eps) {
    const float keep = (float)beta2, rest1 = (float)(1 - beta1), rest2 = (float)(1 - beta2);
    const int64_t PIECE = 1 << 14;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += PIECE)
        for (int64_t i = first; i < std::min(n, first + PIECE); i++) {
            const float g = gradient[i];
            m[i] += rest1 * (g - m[i]);
            v[i] = keep * v[i] + rest2 * g * g;
            value[i] = value[i] * shrink - rate * m[i] / (std::sqrt(v[i]) / root_ + eps);
        }
}

// The sum of squares, in double; pieces are added in order.
inline double sum_of_squares(const float* x, int64_t n) {
    const int64_t PIECE = 1 << 16, pieces = (n + PIECE - 1) / PIECE;
    std::vector<double> sums(pieces);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < pieces; p++) {
        double s = 0;
        for (int64_t i = p * PIECE; i < std::min(n, (p + 1) * PIECE); i++) s += (double)x[i] * x[i];
        sums[p] = s;
    }
    double total = 0;
    for (double s : sums) total += s;
    return total;
}

}  // namespace moss
