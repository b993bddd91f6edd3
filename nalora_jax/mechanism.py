"""Import path of `nalora_jax.method.rules` in the rule files of users and of studies.

The records of studies hold digests of these files, so their imports cannot change.
"""

from nalora_jax.method.rules import Context, Mechanism, register_mechanism

__all__ = ["Context", "Mechanism", "register_mechanism"]
