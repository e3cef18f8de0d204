"""One block table, several workers: each rank holds the K and V of its own heads (Kwon et al. 2023, §4.6)."""
