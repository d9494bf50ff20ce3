"""CUDA kernels: headers (*.cuh) without Jittor in them, which the ops include."""
