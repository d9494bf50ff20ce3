// The instructions that device.cuh writes in PTX: asynchronous copies and products of small matrices, each lane with the parts that the
// PTX ISA's pictures give it ("Matrix Fragments for mma.m16n8k16", "ldmatrix").
#pragma once

namespace moss_cuda {

inline uint4 load16(const void* p) { return *(const uint4*)p; }
inline uint4 load16_once(const void* p) { return *(const uint4*)p; }

#if __CUDA_ARCH__ >= 800
inline void cp_async16(void* shared, const void* global, int bytes = 16) {
    moss_emulation::copy_async(shared, global, bytes, 16 - bytes);
}
inline void cp_async_commit() { moss_emulation::commit_copies(); }
template <int N>
inline void cp_async_wait() { moss_emulation::wait_for_copies(N); }
#else
inline void cp_async16(void* shared, const void* global, int bytes = 16) {
    if (bytes < 16) std::memset((char*)shared + bytes, 0, 16 - bytes);
    std::memcpy(shared, global, bytes);
}
inline void cp_async_commit() {}
template <int N>
inline void cp_async_wait() {}
#endif

template <unsigned LUT>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 8; i++)
        if (LUT >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

#if __CUDA_ARCH__ >= 750

}  // namespace moss_cuda

namespace moss_emulation {

struct Rows {
    uint16_t row[8];      // what this lane's address leads to
    uint32_t* received;
};

template <int MATRICES, bool TRANSPOSED>
void complete_ldmatrix(void* const payload[32], unsigned arrived) {
    if (arrived != ~0u) fail("ldmatrix needs all 32 lanes, and %08x came", arrived);
    for (int l = 0; l < 32; l++) {
        for (int m = 0; m < MATRICES; m++) {
            uint32_t both = 0;
            for (int e = 0; e < 2; e++) {
                int row = TRANSPOSED ? l % 4 * 2 + e : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + e;
                both |= (uint32_t)((const Rows*)payload[m * 8 + row])->row[column] << 16 * e;
            }
            ((Rows*)payload[l])->received[m] = both;
        }
    }
}

template <int MATRICES, bool TRANSPOSED>
void ldmatrix(uint32_t* r, const void* row) {
    Rows rows{{}, r};
    if (lane() < MATRICES * 8) {
        if (!is_shared(row)) fail("ldmatrix reads what is not shared memory");
        if ((size_t)row % 16) fail("ldmatrix: a row starts at an address that is no multiple of 16");
        std::memcpy(rows.row, row, 16);
    }
    collective(MATRICES == 4 ? TRANSPOSED ? "ldmatrix.x4.trans" : "ldmatrix.x4" : TRANSPOSED ? "ldmatrix.x2.trans" : "ldmatrix.x2", ~0u, &rows, complete_ldmatrix<MATRICES, TRANSPOSED>, "");
}

struct Product {
    float* c;
    const uint32_t *a, *b;
};

inline float half_at(const uint32_t* registers, int register_number, int e) {
    return half_to_float((uint16_t)(registers[register_number] >> 16 * e));
}

template <int K>
void complete_mma(void* const payload[32], unsigned arrived) {
    if (arrived != ~0u) fail("mma needs all 32 lanes, and %08x came", arrived);
    float a[16][K], b[K][8];
    for (int l = 0; l < 32; l++) {
        const Product& p = *(const Product*)payload[l];
        int group = l / 4, pair = l % 4 * 2;
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < K / 4; r++) a[group + r % 2 * 8][pair + r / 2 * 8 + e] = half_at(p.a, r, e);
            for (int r = 0; r < K / 8; r++) b[pair + r * 8 + e][group] = half_at(p.b, r, e);
        }
    }
    for (int l = 0; l < 32; l++) {
        float* c = ((const Product*)payload[l])->c;
        for (int i = 0; i < 4; i++) {
            double sum = c[i];
            for (int k = 0; k < K; k++) sum += (double)a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
            c[i] = (float)sum;
        }
    }
}

template <int K>
void mma(float* c, const uint32_t* a, const uint32_t* b) {
    Product p{c, a, b};
    collective(K == 16 ? "mma.m16n8k16" : "mma.m16n8k8", ~0u, &p, complete_mma<K>, "");
}

}  // namespace moss_emulation

namespace moss_cuda {

inline void ldmatrix_x4(uint32_t r[4], const void* row) { moss_emulation::ldmatrix<4, false>(r, row); }
inline void ldmatrix_x2(uint32_t r[2], const void* row) { moss_emulation::ldmatrix<2, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) { moss_emulation::ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2_trans(uint32_t r[2], const void* row) { moss_emulation::ldmatrix<2, true>(r, row); }
inline void mma_1688(float c[4], const uint32_t a[2], const uint32_t b[1]) { moss_emulation::mma<8>(c, a, b); }
inline void mma_16816(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    moss_emulation::mma<16>(c, a, b);
#else
    mma_1688(c, a, b);
    mma_1688(c, a + 2, b + 1);
#endif
}

#endif

}  // namespace moss_cuda
