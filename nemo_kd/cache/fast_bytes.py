"""zlib and base64 by faster packages, where those are installed; results are the same bytes."""

try:
    from isal import isal_zlib as fast_zlib
except ImportError:
    import zlib as fast_zlib  # type: ignore[no-redef]

try:
    import pybase64 as fast_base64
except ImportError:
    import base64 as fast_base64  # type: ignore[no-redef]

__all__ = ["fast_base64", "fast_zlib"]
