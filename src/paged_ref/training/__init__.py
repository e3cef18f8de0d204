"""Training of a small Llama, with its activations in pages."""
