"""CPU implementations of operations; the package is optional.

If it is deleted, every operation uses its plain function. `nalora_jax.cpu.register` registers the
implementation "cpu"; only entry points import it.
"""
