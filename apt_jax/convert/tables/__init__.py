"""One file per model: its table of key patterns, and its config in both dialects."""
