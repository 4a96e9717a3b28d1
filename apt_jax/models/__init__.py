"""Networks: MMDiT (the backbone), the discriminator built on it, and the text encoder."""
