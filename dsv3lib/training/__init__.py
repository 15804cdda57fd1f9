"""Training: text domains, tokenizer, packed stream, trainer and the balance of expert load."""
