"""Decoder families, described by configuration.

Importing a module of this package enters the families' records into the tables of
`nalora_jax.models.family`.
"""

from nalora_jax.models import families as families
