"""Layers shared by every model: functional binding, norms, embeddings, RoPE, attention, stacks."""
