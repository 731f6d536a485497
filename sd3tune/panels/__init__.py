"""Panels for notebooks: they read public objects and send commands."""

from __future__ import annotations

from sd3tune.following import in_processes
from sd3tune.panels.draft import Draft
from sd3tune.panels.run import RunPanel
from sd3tune.panels.settings import LearningPanel, ModelPanel, ValidationPanel
from sd3tune.panels.training import TrainingPanel
from sd3tune.progress import progress

__all__ = ["Draft", "LearningPanel", "ModelPanel", "RunPanel", "TrainingPanel", "ValidationPanel", "in_processes", "progress"]
