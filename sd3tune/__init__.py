"""sd3tune: fine-tune Stable Diffusion 3 and 3.5 with LoRA, from a notebook."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sd3tune.cache import Cache, CacheBuilder
    from sd3tune.checkup import doctor
    from sd3tune.config import RunConfig, check, presets
    from sd3tune.data import Catalog, Plan, discover, plan
    from sd3tune.data.download import download_dataset
    from sd3tune.data.simpletuner import from_simpletuner
    from sd3tune.errors import (
        CacheError,
        CheckpointError,
        ConfigError,
        DataError,
        FileError,
        ModelError,
        Sd3TuneError,
        TrainingError,
    )
    from sd3tune.launching import launch
    from sd3tune.listing import runs
    from sd3tune.models.encoders import encoders
    from sd3tune.models.freeing import free
    from sd3tune.opening import open_run
    from sd3tune.probing import lr_probe
    from sd3tune.records import StepRecord
    from sd3tune.replaying import replay
    from sd3tune.sampling import sample
    from sd3tune.slg import slg_grid
    from sd3tune.trainer import Trainer
    from sd3tune.training.batches import Batches

_HOMES = {
    "Batches": "training.batches", "Cache": "cache", "CacheBuilder": "cache", "CacheError": "errors", "Catalog": "data",
    "CheckpointError": "errors", "ConfigError": "errors", "DataError": "errors", "FileError": "errors", "ModelError": "errors",
    "Plan": "data", "RunConfig": "config", "Sd3TuneError": "errors", "StepRecord": "records", "Trainer": "trainer",
    "TrainingError": "errors", "check": "config", "discover": "data", "encoders": "models.encoders", "plan": "data",
    "doctor": "checkup", "download_dataset": "data.download",
    "free": "models.freeing", "from_simpletuner": "data.simpletuner", "launch": "launching", "lr_probe": "probing",
    "open_run": "opening",
    "presets": "config.presets", "replay": "replaying",
    "runs": "listing", "sample": "sampling", "slg_grid": "slg",
}  # fmt: skip

__all__ = [
    "Batches", "Cache", "CacheBuilder", "CacheError", "Catalog", "CheckpointError", "ConfigError", "DataError", "FileError",
    "ModelError", "Plan", "RunConfig", "Sd3TuneError", "StepRecord", "Trainer", "TrainingError", "check", "discover", "doctor",
    "download_dataset",
    "encoders", "free", "from_simpletuner", "launch", "lr_probe", "open_run", "plan", "presets", "replay", "runs", "sample", "slg_grid",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, so that ``import sd3tune`` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sd3tune' has no attribute {name!r}")
    importlib.import_module("sd3tune.rocm").apply()  # before torch comes with what is asked for
    module = importlib.import_module(f"sd3tune.{_HOMES[name]}")
    return module if name == "presets" else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
