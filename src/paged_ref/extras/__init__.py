"""Capabilities on top of the core: one file each."""
