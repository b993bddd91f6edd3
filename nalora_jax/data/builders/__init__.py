"""TFDS builders of this library; importing one registers its name with TFDS."""
