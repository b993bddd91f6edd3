"""Images: safe decoding, preprocessing as defined by models, and augmentation by (seed, step)."""
