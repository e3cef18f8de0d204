"""Backend `cpu` of the core, on machines where Numba finds no place for its cache, too."""

from .numba_cache import anywhere

with anywhere():
    from ..core.attention.cpu import attend, unavailable, unsupported

__all__ = ["attend", "unavailable", "unsupported"]
