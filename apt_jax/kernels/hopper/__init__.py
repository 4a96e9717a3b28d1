"""Our own flash attention for H100 and H200, in Pallas' Mosaic GPU (imported where it is asked for)."""

TILE = 128  # queries and keys are whole multiples of it
HEADS = (64, 128)  # channels that there are tiles for
