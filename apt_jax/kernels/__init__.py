"""Attention kernels, and products of matrices.

The oracle is plain JAX, exact everywhere and differentiable twice."""
