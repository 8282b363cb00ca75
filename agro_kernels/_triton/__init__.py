"""Triton kernels for CUDA and ROCm devices, one file an op."""
