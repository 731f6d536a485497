"""What has been encoded: content-addressed latents and texts on disk."""

from sd3tune.cache.builder import CacheBuilder
from sd3tune.cache.reading import Cache

__all__ = ["Cache", "CacheBuilder"]
