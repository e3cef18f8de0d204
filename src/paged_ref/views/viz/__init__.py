"""The page table of a run, step by step."""
