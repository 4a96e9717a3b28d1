"""Our flash attention in Pallas: forward, backward, and the function that joins them."""
