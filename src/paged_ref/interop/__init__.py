"""Other libraries: their arrays, their layouts, their checkpoints."""
