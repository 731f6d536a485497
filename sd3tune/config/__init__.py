"""Settings: declared, read, checked, written."""

from sd3tune.config.schema import RunConfig, check

__all__ = ["RunConfig", "check"]
