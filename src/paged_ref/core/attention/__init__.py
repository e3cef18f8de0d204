"""Attention over keys and values in blocks, and in one piece."""
