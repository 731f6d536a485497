"""What a run needs and what this machine has, asked before anything is downloaded. Shows no secrets and changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sd3tune import rocm
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.secrets import without_secrets
from sd3tune.shown import Shown

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One question and its answer."""

    state: State
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:5} {self.what:10} {without_secrets(self.text)}"


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """All answers, in the order in which they matter."""

    findings: tuple[Finding, ...]

    @property
    def well(self) -> bool:
        """Whether nothing stands in the way."""
        return not any(finding.state == "bad" for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def doctor(config: RunConfig | None = None) -> Report:
    """Look at this machine, and at what a configuration asks of it."""
    from sd3tune.models import capabilities

    rows = [*_machine(), *_libraries(), *_disks(config), *_tools()]
    known = capabilities.probe()
    rows += [Finding("ok" if not why else "note", name, "works here" if not why else f"does not: {why}") for name, why in known.items()]
    if config is not None:
        rows += [Finding("bad", "settings", problem) for problem in capabilities.problems(config, known)]
        rows += _optimizer(config)
        rows += [*_memory(config), *_hub(config), *_publishing(config), *_tracker(config), *_webhooks(config)]
    return Report(tuple(rows))


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    from sd3tune.models.components import pick_device

    yield Finding("ok", "Python", f"{platform.python_version()} on {platform.platform()}")
    if driver := _driver():
        yield Finding("ok", "driver", f"NVIDIA {driver}")
    toolkit = f", CUDA {torch.version.cuda}" if torch.version.cuda else f", ROCm {torch.version.hip}" if torch.version.hip else ""
    yield Finding("ok", "torch", f"{torch.__version__}{toolkit}")
    device = pick_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield Finding("ok", "GPU", f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    else:
        yield Finding("note", "GPU", f"none that torch can use; this runs on {device.type}, which is enough for the playground alone")
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")


LIBRARIES = ("diffusers", "transformers", "peft", "ipykernel", "ipywidgets")


def _libraries() -> Iterator[Finding]:
    """What loads models and adapters, and what shows panels."""
    for name in LIBRARIES:
        try:
            yield Finding("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding("note", name, "not installed; notebooks need it: pip install 'sd3tune[notebook]'")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    yield front_end(hasattr(shell, "kernel"), os.environ, sys.modules)


def front_end(kernel: bool, environment: Mapping[str, str], modules: Collection[str]) -> Finding:
    """Where panels are seen, as far as a kernel can tell, and what that means for them."""
    if not kernel:
        return Finding("ok", "front end", "none: this Python is no notebook's; panels are for notebooks, everything else works here")
    if "google.colab" in modules:
        return Finding("note", "front end", "Colab, which shows no changes in the background; run panel.watch() to see the run")
    if "KAGGLE_KERNEL_RUN_TYPE" in environment:
        return Finding("ok", "front end", "Kaggle")
    if page := environment.get("JPY_SESSION_NAME"):
        return Finding("ok", "front end", f"a Jupyter server's, on {Path(page).name}")
    if "VSCODE_PID" in environment:
        return Finding("ok", "front end", "VS Code; run panel.watch() if a panel stands still")
    return Finding("ok", "front end", "a notebook's, of which the kernel cannot tell more; run panel.watch() if a panel stands still")


def _memory(config: RunConfig) -> Iterator[Finding]:
    """What a run needs, against what there is."""
    import psutil
    import torch

    from sd3tune.models import hub, memory

    if config.model.model_flavour not in (*hub.FLAVOURS, "playground"):
        return  # its size is not known before it is there
    need = memory.predict(config, side=64 if config.model.model_flavour == "playground" else 1024)
    gpu = torch.cuda.is_available()
    there = torch.cuda.mem_get_info()[1] if gpu else psutil.virtual_memory().total
    fits = need.peak + (0 if gpu else need.held) < there
    where = f"this {'GPU' if gpu else 'machine'} has {there / 1e9:.1f} GB"
    yield Finding("ok" if fits else "bad", "needs", f"{need}; {where}" + ("" if fits else "; see sd3tune settings --presets"))


def _disks(config: RunConfig | None) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "models": HF_HUB_CACHE,
        "cache": config.run.cache_dir if config else "cache",
        "runs": config.run.output_dir if config else "runs",
    }
    for what, place in places.items():
        path = Path(place).absolute()
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("bad", what, f"{there} cannot be written to; choose another place")
        else:
            yield Finding("ok" if free > 5e9 else "note", what, f"{free / 1e9:.1f} GB free for {path}")


def _tools() -> Iterator[Finding]:
    import torch

    costs = {"g++": ("g++", "int4-quanto and int2-quanto"), "ninja": ("ninja-build", "int4-quanto and int2-quanto")}
    if torch.version.cuda:
        costs["nvcc"] = ("nvidia-cuda-toolkit", "int4-quanto and int2-quanto on the GPU")
    for tool, (package, formats) in costs.items():
        if shutil.which(tool):
            yield Finding("ok", "tools", f"{tool} {_version(tool)}".rstrip())
        else:
            yield Finding("note", "tools", f"no {tool}: {formats} cannot be built; apt install {package}")
    if torch.version.hip:
        yield from _rocm()
    if sys.platform == "darwin":
        yield Finding("note", "Apple", "use mixed_precision: no; fp8-quanto does not work here")


def _version(tool: str) -> str:
    """What a tool says of its version; the empty text when it does not."""
    try:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+\.\d+(?:\.\d+)*", said)
    return found[0] if found else ""


def _driver() -> str:
    """The version of NVIDIA's driver; the empty text when there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.splitlines()[0].strip() if said.returncode == 0 and said.stdout.strip() else ""


def _rocm() -> Iterator[Finding]:
    if importlib.util.find_spec("amdsmi") is None:
        yield Finding("note", "ROCm", f"amdsmi is missing, which reads the GPU's memory: {'; '.join(rocm.AMDSMI)}")
    if late := rocm.missing(os.environ):
        yield Finding("note", "ROCm", f"torch was imported before sd3tune could set {', '.join(late)}; import sd3tune's names first")
    else:
        yield Finding("ok", "ROCm", "; ".join(f"{name}={os.environ[name]}" for name in rocm.defaults()))


def _optimizer(config: RunConfig) -> Iterator[Finding]:
    from sd3tune.models.components import pick_device
    from sd3tune.training.optim import unusable

    name = config.optimizer.optimizer
    if problem := unusable(name, pick_device()):
        yield Finding("bad", "settings", f"optimizer {name} {problem}")


def model_findings(config: RunConfig) -> tuple[Finding, ...]:
    """Whether the base model may be had: token, licence, network."""
    return tuple(_hub(config))


def tracker_findings(config: RunConfig) -> tuple[Finding, ...]:
    """Whether the tracker is there, and would not ask for a login."""
    return tuple(_tracker(config))


def _hub(config: RunConfig) -> Iterator[Finding]:
    from huggingface_hub import HfApi, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    from sd3tune.models import hub

    model = config.model
    name = hub.FLAVOURS.get(model.model_flavour or "", model.pretrained_model_name_or_path or "")
    if model.model_flavour == "playground" or Path(name).exists() or not hub.is_name(name):
        yield Finding("ok", "model", "the playground, which comes with the package" if model.model_flavour == "playground" else name)
        return
    if late := hub.late_endpoint():
        yield Finding("note", "mirror", late)
    yield Finding(
        "ok" if hub.has_token() else "note", "token", "there is one" if hub.has_token() else "there is none; gated models need one"
    )
    try:
        HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).auth_check(name)
        yield Finding("ok", "model", f"{name} may be downloaded")
    except (OSError, HTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled) as error:
        yield Finding("bad", "model", f"{name}: {hub.explained(error, name)}")


def _publishing(config: RunConfig) -> Iterator[Finding]:
    """Whether the token may write where the adapter is to be uploaded."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    from sd3tune.models.hub import has_token
    from sd3tune.reporting.publishing import SETTINGS, default_api, wanted_name, write_problem

    if not config.reporting.push_to_hub:
        return
    name = wanted_name(config)
    if not has_token():
        yield Finding("bad", "upload", f"there is no token; run: hf auth login, with a token of type write ({SETTINGS}), or set HF_TOKEN")
        return
    try:
        problem = write_problem(default_api().whoami(), name)
        yield Finding("bad" if problem else "ok", "upload", problem or f"the token may write to {name}")
    except errors.OfflineModeIsEnabled:
        yield Finding("note", "upload", "HF_HUB_OFFLINE is set; the run writes its card and sd3tune push RUN uploads it later")
    except (OSError, HTTPError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        wrong = "the token is not valid (any more); run: hf auth login, with a new one of type write"
        text = wrong if status == 401 else f"the hub cannot be asked now ({status or type(error).__name__}); the upload waits for the end"
        yield Finding("bad" if status == 401 else "note", "upload", text)


def _tracker(config: RunConfig) -> Iterator[Finding]:
    """Whether the tracker is there, and whether it would ask for a login."""
    from sd3tune.reporting.trackers import kinds_of, left_out

    if config.reporting.report_to == "none":
        return
    try:
        kinds = kinds_of(config)
    except ConfigError as error:
        yield Finding("bad", "tracker", "; ".join(error.problems))
        return
    if kinds:
        yield Finding("ok", "tracker", f"{', '.join(kinds)}: installed, and no login is missing")
    for said in left_out(config):
        yield Finding("note", "tracker", said)


def _webhooks(config: RunConfig) -> Iterator[Finding]:
    """Whether each webhook has its address; nobody is called."""
    from sd3tune.config.hooks import hooks_of

    try:
        for hook in hooks_of(config.reporting.webhook_config):
            yield Finding("ok", "webhook", hook.name.removeprefix("webhook "))
    except ConfigError as error:
        yield Finding("bad", "webhook", "; ".join(error.problems))
