"""Mechanisms as entries of a registry, one file each, and the optimizer chain (`nalora_jax.optim.nalora`)."""

# Importing an entry registers it.
from nalora_jax.optim import curvature_cap, delta_importance, freeze, importance_mask, step_scale, stochastic_mask
from nalora_jax.optim.mechanism import Context, Mechanism, make, mechanism_names, register_mechanism

__all__ = [
    "Context",
    "Mechanism",
    "curvature_cap",
    "delta_importance",
    "freeze",
    "importance_mask",
    "make",
    "mechanism_names",
    "register_mechanism",
    "step_scale",
    "stochastic_mask",
]
