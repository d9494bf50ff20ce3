// What a GPU computes in training beside its matrix products, which are cuBLAS': one launch a call. All of it works on memory that
// addresses describe; rows are contiguous unless a stride says how many numbers they are apart.
#pragma once
#include <stdexcept>

#include "dequantise.cuh"
#include "embedding.cuh"
#include "train_rows.cuh"

namespace moss_cuda {

// Filled by moss_jt/train/gpu_ops.py, field by field, 8 bytes each: counts and strides, numbers, addresses, in the order in which
// run_train takes them.
struct TrainCall {
    int64_t what;
    int64_t n[6];
    double f[2];
    void* p[8];

    template <class T>
    T* at(int i) const { return static_cast<T*>(p[i]); }
};

enum TrainWhat { DEQUANTISE, EMBED, NORM, NORM_BACKWARD, TURN, WEIGH, WEIGH_BACKWARD, GELU, GELU_BACKWARD, RESIDUAL, DROP, CROSS_ENTROPY, ZERO };

// What n[0] rows take. Throws std::runtime_error where something cannot be launched.
inline void run_train(const TrainCall& c, cudaStream_t stream) {
    const int64_t rows = c.n[0], *n = c.n + 1;
    const float one = (float)c.f[0], two = (float)c.f[1];
#define MOSS_ROWS(kernel, ...) MOSS_LAUNCH(kernel, dim3(rows), dim3(TRAIN_THREADS), 0, stream, __VA_ARGS__)
    switch (c.what) {
    case DEQUANTISE: {
        const Coded w{n[1], n[2], n[3], n[4], c.p[0], c.at<half>(1), c.at<uint8_t>(2), c.at<int32_t>(3)};
        return launch_dequantise(w, c.at<float>(4), n[0], rows, stream);
    }
    case EMBED: return launch_embedding(nullptr, c.at<half>(0), c.at<float>(1), rows, n[0], stream);
    case NORM:
        MOSS_ROWS(train_norm_kernel, c.at<float>(0), c.at<int32_t>(1), c.at<float>(2), c.at<float>(3), one, c.at<float>(4), c.at<float>(5), n[0]);
        return;
    case NORM_BACKWARD:
        MOSS_ROWS(train_norm_backward_kernel, c.at<float>(0), c.at<int32_t>(1), c.at<float>(2), c.at<float>(3), c.at<float>(4), c.at<float>(5), n[0]);
        return;
    case TURN: MOSS_ROWS(turn_kernel, c.at<float>(0), n[0], c.at<float>(1), n[1], n[2], n[3], n[4], one); return;
    case WEIGH: MOSS_ROWS(weigh_kernel, c.at<float>(0), n[0], one); return;
    case WEIGH_BACKWARD: MOSS_ROWS(weigh_backward_kernel, c.at<float>(0), c.at<float>(1), n[0], one); return;
    case GELU: MOSS_ROWS(gelu_kernel, c.at<float>(0), n[0], c.at<float>(1), c.at<float>(2), n[1], n[2]); return;
    case GELU_BACKWARD: MOSS_ROWS(gelu_backward_kernel, c.at<float>(0), c.at<float>(1), c.at<float>(2), n[0], n[1], n[2]); return;
    case RESIDUAL: MOSS_ROWS(residual_kernel, c.at<float>(0), c.at<float>(1), c.at<float>(2), n[0]); return;
    case DROP: {
        const Dropout dropout{(uint64_t)n[4], one, two};
        MOSS_ROWS(drop_kernel, c.at<float>(0), n[0], dropout, c.at<float>(1), n[1], n[2], n[3] != 0);
        return;
    }
    case CROSS_ENTROPY:
        MOSS_ROWS(cross_entropy_kernel, c.at<float>(0), c.at<float>(1), c.at<int32_t>(2), one, n[1] != 0, c.at<float>(3), n[0]);
        return;
    case ZERO: MOSS_ROWS(zero_kernel, c.at<float>(0), n[0]); return;
    }
    throw std::runtime_error("run_train: nothing has this number");
}
#undef MOSS_ROWS

}  // namespace moss_cuda
