"""Held-out metrics with confidence intervals."""
