"""Panels for notebooks: they read public objects and send commands."""

from __future__ import annotations

from sd3tune.following import in_processes
from sd3tune.panels.compare import ComparePanel
from sd3tune.panels.configure import ConfigurePanel, configure
from sd3tune.panels.data import DataPanel
from sd3tune.panels.doctor import DoctorPanel
from sd3tune.panels.draft import Draft
from sd3tune.panels.export import ExportPanel
from sd3tune.panels.lab import GridLab
from sd3tune.panels.run import RunPanel
from sd3tune.panels.settings import LearningPanel, ModelPanel, ValidationPanel
from sd3tune.panels.studio import Studio
from sd3tune.panels.training import TrainingPanel
from sd3tune.progress import progress

__all__ = [
    "ComparePanel", "ConfigurePanel", "DataPanel", "DoctorPanel", "Draft", "ExportPanel", "GridLab", "LearningPanel", "ModelPanel",
    "RunPanel", "Studio", "TrainingPanel", "ValidationPanel", "configure", "in_processes", "progress",
]  # fmt: skip
