"""PyTorch checkpoints in and out: one table of key patterns per model and one small engine."""
