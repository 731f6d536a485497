"""Consumers of a run's records that leave the machine, and the report: none of them can stop or slow the run."""

from sd3tune.reporting.reporters import Reporters, require

__all__ = ["Reporters", "require"]
