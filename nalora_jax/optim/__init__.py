"""The two mechanisms as optax transforms."""
