"""Dual encoders: an image tower and a text tower whose features are compared."""
