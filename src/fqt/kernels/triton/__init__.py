"""Kernels for CUDA devices, in Triton (a placeholder: registration comes with the quantizers)."""
