"""NA-LoRA: the equations, the channel statistics, the rules and one training step.

Read `nalora_jax.method.ffn` and `nalora_jax.method.step` first. The package contains no code for a
particular platform: implementations register themselves for the operations that it defines.
"""
