"""Nonlinearity-aware LoRA for gated-FFN Transformers in JAX."""
