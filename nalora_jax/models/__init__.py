"""Decoder families, described by configuration."""
