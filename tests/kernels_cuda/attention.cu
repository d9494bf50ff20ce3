#include <vector>

#include "attention.cuh"
static std::vector<moss_cuda::Sequence> sequences;  // in the host's memory, as launch_attention wants them

void begin(int n) { sequences.clear(), sequences.reserve(n); }
void add(int place, int start, int first, int count) { sequences.push_back({place, start, first, count}); }

int64_t workspace(int64_t H, int64_t S, int64_t C, int64_t T, int64_t n) { return attention_workspace({H, S, 0, C}, T, n); }

void attention(const half* qkv, const float* angles, half* keys, half* values, int64_t H, int64_t S, int64_t rotary, int64_t C,
               half* both, int64_t I, void* workspace) {
    launch_attention(qkv, angles, {16, keys, values, nullptr, nullptr}, {H, S, rotary, C}, sequences.data(), sequences.size(), both,
                     I, workspace, 0);
}
void attention_int8(const half* qkv, const float* angles, int8_t* keys, int8_t* values, float* key_scale, float* value_scale,
                    int64_t H, int64_t S, int64_t rotary, int64_t C, half* both, int64_t I, void* workspace) {
    launch_attention(qkv, angles, {8, keys, values, key_scale, value_scale}, {H, S, rotary, C}, sequences.data(), sequences.size(),
                     both, I, workspace, 0);
}
