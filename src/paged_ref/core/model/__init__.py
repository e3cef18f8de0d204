"""A Llama decoder, its checkpoint and its tokenizer."""
