"""Decoder families by configuration."""
