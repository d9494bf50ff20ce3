// What training does beside its matrix products, in floats and row by row: a block of threads has a row, and sums in an order that
// does not depend on anything else, so that the same inputs give the same bits. Each kernel reads its rows once or twice.
#pragma once
#include "device.cuh"

namespace moss_cuda {

constexpr int TRAIN_THREADS = 256;

#define MOSS_TRAIN_KERNEL __global__ void __launch_bounds__(TRAIN_THREADS)

// ---- norm ----------------------------------------------------------------------------------------------------------------------

// y = xhat * weight + bias, xhat = (x - mean) * inverse; stats (rows, 2): each row's mean and inverse deviation. Row t of x is
// which[t]; null: t.
MOSS_TRAIN_KERNEL train_norm_kernel(const float* __restrict__ x, const int32_t* __restrict__ which, const float* __restrict__ weight,
                                    const float* __restrict__ bias, float eps, float* __restrict__ y, float* __restrict__ stats, int64_t D) {
    x += (which ? which[blockIdx.x] : blockIdx.x) * D, y += blockIdx.x * D, stats += 2 * blockIdx.x;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) sum += x[i];
    const float mean = block_sum<TRAIN_THREADS>(sum) / D;
    sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) sum += (x[i] - mean) * (x[i] - mean);
    const float inverse = rsqrtf(block_sum<TRAIN_THREADS>(sum) / D + eps);
    if (threadIdx.x == 0) stats[0] = mean, stats[1] = inverse;
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

// dx += the derivative through the norm of dy; rows of x and dx are which[t], all different.
MOSS_TRAIN_KERNEL train_norm_backward_kernel(const float* __restrict__ x, const int32_t* __restrict__ which,
                                             const float* __restrict__ stats, const float* __restrict__ weight,
                                             const float* __restrict__ dy, float* __restrict__ dx, int64_t D) {
    const int64_t row = (which ? which[blockIdx.x] : blockIdx.x) * D;
    x += row, dx += row, dy += blockIdx.x * D;
    const float mean = stats[2 * blockIdx.x], inverse = stats[2 * blockIdx.x + 1];
    float sum = 0, dot = 0;
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) {
        const float g = dy[i] * weight[i];
        sum += g, dot += g * ((x[i] - mean) * inverse);
    }
    sum = block_sum<TRAIN_THREADS>(sum) / D, dot = block_sum<TRAIN_THREADS>(dot) / D;
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS)
        dx[i] += inverse * (dy[i] * weight[i] - sum - (x[i] - mean) * inverse * dot);
}

// ---- attention -----------------------------------------------------------------------------------------------------------------

// Turns the first `rotary` entries of `heads` heads of S in each row by the angles (2, T, rotary / 2) of its position, row % T.
MOSS_TRAIN_KERNEL turn_kernel(float* __restrict__ y, int64_t stride, const float* __restrict__ angles, int64_t T, int64_t heads,
                              int64_t S, int64_t rotary, float way) {
    const int64_t pairs = rotary / 2;
    const float *cos = angles + blockIdx.x % T * pairs, *sin = cos + T * pairs;
    for (int64_t i = threadIdx.x; i < heads * pairs; i += TRAIN_THREADS) {
        float* const at = y + blockIdx.x * stride + i / pairs * S + i % pairs * 2;
        const float a = at[0], b = at[1], c = cos[i % pairs], s = way * sin[i % pairs];
        at[0] = a * c - b * s, at[1] = b * c + a * s;
    }
}

// Scores (rows, T), row r of query r % T, become its weights of the keys that it sees, and zeros for those that come later.
MOSS_TRAIN_KERNEL weigh_kernel(float* __restrict__ x, int64_t T, float scale) {
    x += blockIdx.x * T;
    const int64_t seen = blockIdx.x % T + 1;
    float top = x[0], total = 0;
    for (int64_t j = threadIdx.x; j < seen; j += TRAIN_THREADS) top = fmaxf(top, x[j]);
    top = block_max<TRAIN_THREADS>(top);  // and all threads have read x[0]
    for (int64_t j = threadIdx.x; j < seen; j += TRAIN_THREADS) total += x[j] = expf((x[j] - top) * scale);
    total = 1 / block_sum<TRAIN_THREADS>(total);
    for (int64_t j = threadIdx.x; j < T; j += TRAIN_THREADS) x[j] = j < seen ? x[j] * total : 0;
}

// Derivatives d of weights w, both (rows, T), become those of the scores: w (d - sum of w d) * scale.
MOSS_TRAIN_KERNEL weigh_backward_kernel(const float* __restrict__ w, float* __restrict__ d, int64_t T, float scale) {
    w += blockIdx.x * T, d += blockIdx.x * T;
    const int64_t seen = blockIdx.x % T + 1;
    float sum = 0;
    for (int64_t j = threadIdx.x; j < seen; j += TRAIN_THREADS) sum += w[j] * d[j];
    sum = block_sum<TRAIN_THREADS>(sum);
    for (int64_t j = threadIdx.x; j < T; j += TRAIN_THREADS) d[j] = j < seen ? w[j] * (d[j] - sum) * scale : 0;
}

// ---- gelu and residual ---------------------------------------------------------------------------------------------------------

// 1 / (1 + e^(-2u)), which is 0.5 (1 + tanh(u)), with the u of gelu_new.
__device__ inline float gelu_share(float x) { return 1 / (1 + expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

// f += bias; g = gelu_new(f). Rows of I, of f and g so far apart.
MOSS_TRAIN_KERNEL gelu_kernel(float* __restrict__ f, int64_t f_stride, const float* __restrict__ bias, float* __restrict__ g,
                              int64_t g_stride, int64_t I) {
    f += blockIdx.x * f_stride, g += blockIdx.x * g_stride;
    for (int64_t i = threadIdx.x; i < I; i += TRAIN_THREADS) {
        const float x = f[i] + bias[i];
        f[i] = x, g[i] = x * gelu_share(x);
    }
}

// df = gelu_new'(f) dg, in rows as f's and g's: s + x s (1 - s) 2u'.
MOSS_TRAIN_KERNEL gelu_backward_kernel(const float* __restrict__ f, const float* __restrict__ dg, float* __restrict__ df, int64_t f_stride,
                                       int64_t g_stride, int64_t I) {
    f += blockIdx.x * f_stride, df += blockIdx.x * f_stride, dg += blockIdx.x * g_stride;
    for (int64_t i = threadIdx.x; i < I; i += TRAIN_THREADS) {
        const float x = f[i], s = gelu_share(x), slope = 1.5957691216f * (1 + 3 * 0.044715f * x * x);
        df[i] = dg[i] * (s + x * s * (1 - s) * slope);
    }
}

// y = x + bias.
MOSS_TRAIN_KERNEL residual_kernel(const float* __restrict__ x, const float* __restrict__ bias, float* __restrict__ y, int64_t D) {
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) y[blockIdx.x * D + i] = x[blockIdx.x * D + i] + bias[i];
}

// ---- dropout -------------------------------------------------------------------------------------------------------------------

// The masks of train_linear.h: number i is left out where the hash of seed + i is below the limit; others are multiplied.
struct Dropout {
    uint64_t seed;
    float limit, times;  // dropout * 2^24, and 1 / (1 - dropout)

    __device__ float kept(uint64_t i) const {
        uint64_t z = seed + i * 0x9e3779b97f4a7c15u;  // splitmix64
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return (float)((z ^ z >> 31) >> 40) < limit ? 0 : times;
    }
};

// y = or += x times the mask (rows, K).
MOSS_TRAIN_KERNEL drop_kernel(const float* __restrict__ x, int64_t x_stride, Dropout dropout, float* __restrict__ y, int64_t y_stride,
                              int64_t K, bool add_to) {
    x += blockIdx.x * x_stride, y += blockIdx.x * y_stride;
    for (int64_t i = threadIdx.x; i < K; i += TRAIN_THREADS)
        y[i] = (add_to ? y[i] : 0) + x[i] * dropout.kept(blockIdx.x * (uint64_t)K + i);
}

// ---- the loss ------------------------------------------------------------------------------------------------------------------

// Of logits (rows, V) + bias: found (rows, 4) = the largest, the sum of e^(logit - largest), the target's, and 1 where that is the
// first of the largest ones. The logits become `scale` times the derivative of -log p, where that is wanted.
MOSS_TRAIN_KERNEL cross_entropy_kernel(float* __restrict__ logits, const float* __restrict__ bias, const int32_t* __restrict__ targets,
                                       float scale, bool derive, float* __restrict__ found, int64_t V) {
    logits += blockIdx.x * V, found += 4 * blockIdx.x;
    const int target = targets[blockIdx.x];
    float top = -INFINITY, total = 0;
    for (int64_t i = threadIdx.x; i < V; i += TRAIN_THREADS) top = fmaxf(top, logits[i] += bias[i]);
    top = block_max<TRAIN_THREADS>(top);
    const float wanted = logits[target];
    int before = 0;  // as large ones with a smaller number
    for (int64_t i = threadIdx.x; i < V; i += TRAIN_THREADS) {
        before += i < target && logits[i] == top;
        total += expf(logits[i] - top);
    }
    total = block_sum<TRAIN_THREADS>(total), before = block_sum<TRAIN_THREADS>(before);  // and all threads have read `wanted`
    if (threadIdx.x == 0) found[0] = top, found[1] = total, found[2] = wanted, found[3] = wanted == top && !before;
    if (!derive) return;
    const float times = scale / total;
    for (int64_t i = threadIdx.x; i < V; i += TRAIN_THREADS) logits[i] = expf(logits[i] - top) * times - (i == target ? scale : 0);
}

MOSS_TRAIN_KERNEL zero_kernel(float* __restrict__ x, int64_t D) {
    for (int64_t i = threadIdx.x; i < D; i += TRAIN_THREADS) x[blockIdx.x * D + i] = 0;
}

#undef MOSS_TRAIN_KERNEL

}  // namespace moss_cuda
