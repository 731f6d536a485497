"""Every setting, declared once. Leaf names are unique over all sections."""

from sd3tune.config.sections.judging import Evaluation, Run
from sd3tune.config.sections.model import Adapter, Memory, Model
from sd3tune.config.sections.reporting import Reporting
from sd3tune.config.sections.training import Data, Noise, Objective, Optimizer, Schedule
from sd3tune.config.sections.validating import Validation

__all__ = ["SECTION_CLASSES", "Adapter", "Data", "Evaluation", "Memory", "Model", "Noise", "Objective", "Optimizer"]
__all__ += ["Reporting", "Run", "Schedule", "Validation"]

SECTION_CLASSES: dict[str, type] = {
    "model": Model, "adapter": Adapter, "data": Data, "noise": Noise, "objective": Objective, "optimizer": Optimizer, "schedule": Schedule,
    "memory": Memory, "validation": Validation, "evaluation": Evaluation, "reporting": Reporting, "run": Run,
}  # fmt: skip
"""In the order of files and forms."""
