"""Reading and writing of model and adapter files.

Importing a module of this package enters the names of encoders into the tables of
`nalora_jax.weights.keymaps`.
"""

from nalora_jax.weights import encoders as encoders
