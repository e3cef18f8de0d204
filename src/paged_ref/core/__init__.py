"""The whole idea of PagedAttention, in one room that imports nothing else of the package."""
