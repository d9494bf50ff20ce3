// The inputs of a product: T rows of K floats, each row padded with zeros to a whole number of groups and aligned to a
// cache line, so that no inner loop has a tail on this side. The storage is kept from call to call.
#pragma once
#include <algorithm>
#include <vector>
#include "simd.h"

namespace moss {

const int64_t GROUP = 128;  // inputs that share a scale and a zero in int8 and int4 weights

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that only ever grows. Its content is lost when it does.
template <class E>
struct Scratch {
    std::vector<E> storage;
    E* get(int64_t n) {
        if ((int64_t)storage.size() < n + 64) storage.resize(n + 64);
        return (E*)round_up((int64_t)storage.data(), 64);
    }
};

struct Inputs {
    Scratch<float> memory;
    float* at = nullptr;
    int64_t T = 0, K = 0, stride = 0;

    void resize(int64_t tokens, int64_t inputs) {
        T = tokens, K = inputs, stride = round_up(inputs, GROUP);
        at = memory.get(T * stride);
    }
    // Copy columns [k, k + n) of every row from rows of `from_stride` floats; the last call pads.
    void put(const float* from, int64_t from_stride, int64_t k, int64_t n) {
        for (int64_t t = 0; t < T; t++) {
            memcpy(at + t * stride + k, from + t * from_stride, 4 * n);
            std::fill(at + t * stride + k + n, at + (t + 1) * stride, 0.f);
        }
    }
    const float* row(int64_t t) const { return at + t * stride; }
};

}  // namespace moss
