"""Pure functional layers: adapters, gated feed-forward blocks, attention, loss."""
