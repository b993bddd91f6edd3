"""Held-out metrics with intervals."""
