"""The walk through a kernel, access by access."""
