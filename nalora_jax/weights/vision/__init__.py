"""Files of dual encoders and of their towers: weights, tokenizer, image processor, adapters."""
