"""What exists because of a CPU, and can be deleted: without it every operation is its plain function.

`nalora_jax.cpu.register` registers the implementation "cpu"; nothing but the entry points imports it.
"""
