"""The processes that train one adapter together: started by torchrun or accelerate, joined through accelerate's process state.

Every process holds the whole adapter and its moments and does every update; the pictures of a batch are shared out, and the
gradients are summed once. Only the main process writes, draws and is steered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from sd3tune.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the main one may be paused, draw pictures, or wait for room on its disk.

A process that dies is noticed at once on CPUs, where its connections break. On GPUs the launcher ends the others after 30 s, and what was
done since the last checkpoint may be lost.
"""

REFUSED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What a launcher's environment may ask for, and what that is."""


@dataclass(frozen=True)
class Processes:
    """This process (``rank``, from 0) among ``count``; this class itself is the one that is alone."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this one writes, draws and is steered."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """Where this process computes; ``None`` leaves that to the machine."""
        return None

    def places(self, images: int) -> range:
        """This process's share of a batch of so many images."""
        return range(self.rank, images, self.count)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes. Raises: TrainingError when one of them is gone."""
        return values

    def told(self, value: T) -> T:
        """What the main process has for ``value``. Raises: TrainingError when one of them is gone."""
        return value

    def wait(self) -> None:
        """Go on when all processes are here. Raises: TrainingError when one of them is gone."""

    def by_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process, or the error that it ended with there, in every process."""
        return work()


class Together(Processes):
    """Several processes, connected through accelerate."""

    @property
    def device(self) -> torch.device | None:
        """The device that accelerate gave this process."""
        from accelerate import PartialState

        found: torch.device = PartialState().device
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each. Raises: TrainingError when one of them is gone."""
        from accelerate.utils import reduce
        from torch import OutOfMemoryError

        try:
            total: Tensor = reduce(values, "sum")
        except OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from None
        return total

    def told(self, value: T) -> T:
        """What the main process has for ``value``. Raises: TrainingError when one of them is gone."""
        from accelerate.utils import broadcast_object_list

        try:
            rows: list[T] = broadcast_object_list([value])
        except RuntimeError as error:
            raise self._lost(error) from None
        return rows[0]

    def wait(self) -> None:
        """Go on when all processes are here. Raises: TrainingError when one of them is gone."""
        from accelerate.utils import wait_for_everyone

        try:
            wait_for_everyone()
        except RuntimeError as error:
            raise self._lost(error) from None

    def by_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process; its error is raised there, and its text as a TrainingError in the others."""
        result: tuple[T | None, str] = (None, "")
        failure: BaseException | None = None
        if self.main:
            try:
                result = work(), ""
            except BaseException as error:  # noqa: BLE001 (it is raised below, when the others know)
                failure, result = error, (None, f"{type(error).__name__}: {error}")
        value, problem = self.told(result)
        if failure is not None:
            raise failure
        if problem:
            raise TrainingError(f"the main process ended: {problem}")
        return value  # type: ignore[return-value]

    def _lost(self, error: RuntimeError) -> TrainingError:
        first = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        return TrainingError(
            f"process {self.rank} of {self.count}: another process is gone ({first}); look at its message, and resume from the newest "
            "checkpoint"
        )


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher started, by its environment."""
    return int(environment.get("WORLD_SIZE") or 1)


def join(wanted: int | None = None) -> Processes:
    """Connect with the other processes that the launcher started; alone where there are none.

    ``wanted`` is how many there should be. Raises: ConfigError when there are others, or when the launcher asks for FSDP or DeepSpeed.
    """
    for name, what in REFUSED.items():
        if os.environ.get(name, "").lower() == "true":
            raise ConfigError(
                [f"{what} is not used: an adapter's state is small enough for every process, and a base that is too large is kept in "
                 f"fewer bits (base_model_precision); launch without {what}"],
                "the launcher",
            )  # fmt: skip
    found = started()
    if wanted is not None and wanted != found:
        raise ConfigError(
            [f"num_processes is {wanted}, and {found} started; start them with: torchrun --nproc_per_node {wanted} -m sd3tune train "
             f"run.yaml (on CPUs accelerate launch starts one and says nothing), or set num_processes: {found}"],
            "the launcher",
        )  # fmt: skip
    return _connected() if found > 1 else Processes()


def _connected() -> Processes:
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Together(rank=int(state.process_index), count=int(state.num_processes))


def leave() -> None:
    """Take leave of the other processes, when all have done their work."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
