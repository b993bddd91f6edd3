"""The two mechanisms as pure rules and optax transforms; `nalora_jax.optim.nalora` composes and re-exports them."""
