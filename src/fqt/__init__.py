"""Fully quantized training of PyTorch models."""
