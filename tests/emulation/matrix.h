// The instructions that device.cuh writes in PTX.
#pragma once

namespace moss_cuda {

inline uint4 load16(const void* p) { return __ldg((const uint4*)p); }
inline uint4 load16_once(const void* p) { return __ldg((const uint4*)p); }

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

template <int MATRICES, bool TRANSPOSED>
void ldmatrix(uint32_t* r, const void* row) {
    Rows rows{{}, r};
    if (lane() < MATRICES * 8) {
        if (!is_shared(row)) fail("ldmatrix reads what is not shared memory");
        if ((size_t)row % 16) fail("ldmatrix: a row starts at an address that is no multiple of 16");
        std::memcpy(rows.row, row, 16);
    }
    const char* four = TRANSPOSED ? "ldmatrix.x4.trans" : "ldmatrix.x4";
    const char* two = TRANSPOSED ? "ldmatrix.x2.trans" : "ldmatrix.x2";
    collective(MATRICES == 4 ? four : two, ~0u, &rows, complete_ldmatrix<MATRICES, TRANSPOSED>, "");
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
