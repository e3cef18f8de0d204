"""Kernels made for speed. Each is a backend of the core's attention, or takes the place of array code."""
