"""Fused operations: each file holds a Triton kernel and its PyTorch reference side by side."""
