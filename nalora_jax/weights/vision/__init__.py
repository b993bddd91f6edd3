"""Files of dual encoders and their towers: weights, tokenizer, image processor, adapters."""
