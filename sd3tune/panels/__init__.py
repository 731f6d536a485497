"""Panels for notebooks: they read public objects and send commands."""

from __future__ import annotations

from sd3tune.following import in_processes
from sd3tune.panels.training import TrainingPanel
from sd3tune.progress import progress

__all__ = ["TrainingPanel", "in_processes", "progress"]
