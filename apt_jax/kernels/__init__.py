"""Attention kernels. The oracle is plain JAX, exact everywhere and differentiable twice."""
