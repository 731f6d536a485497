"""What has been encoded: content-addressed latents and texts on disk."""

from sd3tune.cache.builder import Cache, CacheBuilder

__all__ = ["Cache", "CacheBuilder"]
