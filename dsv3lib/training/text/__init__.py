"""Training text: domains, tokenizer, document order, packing, fill-in-the-middle."""
