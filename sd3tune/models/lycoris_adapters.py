"""LyCORIS adapters (LoKr, LoHa, and the rest) inside a transformer, through lycoris-lora; its files are lycoris' own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.errors import CheckpointError, ConfigError
from sd3tune.files import write_with
from sd3tune.models.lora_files import Verified

ALGORITHMS = ("lora", "locon", "loha", "lokr", "full", "tlora", "diag-oft", "boft", "dylora", "glora")
"""Not ia3: lycoris-lora (4.1.3) cannot read the files that it writes of it."""

WHOLE = ("full", "tlora", "diag-oft", "boft")
"""Those that need the base's weights whole; beside a quantised one the last two would learn another thing than their files then do."""

DEFAULT: dict[str, Any] = {
    "algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True, "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"], "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}  # fmt: skip
"""What is used without a file: the example of SimpleTuner's guide to LyCORIS."""


def read_config(path: str | None) -> dict[str, Any]:
    """A configuration in the form of SimpleTuner's ``lycoris_config.json``. Raises: ConfigError."""
    if path is None:
        return DEFAULT
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"lycoris_config: {path} cannot be read as JSON ({error})"]) from None
    problems = []
    if not isinstance(found, dict):
        raise ConfigError([f"lycoris_config: {path} is not an object with algo, multiplier and linear_alpha"])
    if found.get("algo") not in ALGORITHMS:
        problems.append(f"lycoris_config: algo {found.get('algo')!r} is none of {', '.join(ALGORITHMS)}")
    needed = ("multiplier", "linear_alpha", *(() if found.get("full_matrix") else ("linear_dim",)))
    problems += [f"lycoris_config: {key} is missing or no number" for key in needed if not isinstance(found.get(key), (int, float))]
    if problems:
        raise ConfigError(problems)
    return found


def add_lycoris(transformer: Any, config: Mapping[str, Any], *, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """Add a LyCORIS network that changes nothing yet and return it with its fp32 weights by the name they have in files.

    Raises: ConfigError when lycoris-lora is missing, an option is unknown, or nothing is matched.
    """
    try:
        from lycoris import LycorisNetwork
    except ImportError:
        raise ConfigError(["lora_type lycoris needs lycoris-lora; pip install 'sd3tune[lycoris]'"]) from None
    rest = {key: value for key, value in config.items() if key not in ("algo", "multiplier", "linear_dim", "linear_alpha", "apply_preset")}
    if any(type(module) is not nn.Linear and isinstance(module, nn.Linear) for module in transformer.modules()):
        if config["algo"] in WHOLE:
            raise ConfigError([f"lycoris_config: algo {config['algo']} needs base_model_precision: no_change"])
        rest["bypass_mode"] = True  # add what the adapter makes of the input: a quantised weight cannot be added to
    try:
        with (
            _preset(LycorisNetwork, {"target_module": ["Attention"], **(config.get("apply_preset") or {})}),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            network = LycorisNetwork(
                transformer, multiplier=float(config["multiplier"]), lora_dim=int(config.get("linear_dim") or 10000),
                alpha=float(config["linear_alpha"]), network_module=config["algo"], **_named(rest),
            )  # fmt: skip
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError([f"lycoris_config: {error}"]) from None
    if not network.loras:
        raise ConfigError(["lycoris_config: apply_preset matches no layer of this model; target_module is Attention, FeedForward, ..."])
    network.apply_to()
    network.to(next(transformer.parameters()).device, torch.float32)
    weights = dict(network.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(True)
    return network, weights


@contextmanager
def switched_off(network: Any) -> Iterator[None]:
    """The transformer without its LyCORIS adapter, for the duration of the block.

    Layers answer by themselves again: a multiplier of 0 would leave part of the change where weights are decomposed (DoRA). Only
    ``full``, which takes the layer's weight over, is multiplied by 0 and then uses the weight that it kept.
    """
    own = [layer for layer in network.loras if getattr(layer.org_module[0], "weight", None) is not None]
    taken = [(layer, layer.multiplier) for layer in network.loras if layer not in own]
    for layer in own:
        layer.org_module[0].forward = layer.org_forward
    for layer, _ in taken:
        layer.multiplier = 0.0
    try:
        yield
    finally:
        for layer in own:
            layer.org_module[0].forward = layer.forward
        for layer, multiplier in taken:
            layer.multiplier = multiplier


@contextmanager
def scaled(network: Any, strength: float) -> Iterator[None]:
    """A share of the adapter's change, for the duration of the block."""
    before = [layer.multiplier for layer in network.loras]
    for layer in network.loras:
        layer.multiplier = strength * layer.multiplier
    try:
        yield
    finally:
        for layer, multiplier in zip(network.loras, before, strict=True):
            layer.multiplier = multiplier


PRESET = ("ENABLE_CONV", "TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "MODULE_ALGO_MAP", "NAME_ALGO_MAP", "USE_FNMATCH",
          "TARGET_EXCLUDE_NAME")  # fmt: skip


@contextmanager
def _preset(network_class: Any, preset: Mapping[str, Any]) -> Iterator[None]:
    """lycoris keeps presets in class attributes: set for the block, and put back at its end."""
    before = {name: getattr(network_class, name) for name in PRESET}
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        network_class.apply_preset(preset)
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(network_class, name, value)


def _named(rest: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that the network takes, where the guide's file has others."""
    return {{"dora_wd": "weight_decompose"}.get(key, key): value for key, value in rest.items()}


def save_lycoris(path: Path, network: Any, weights: Mapping[str, Tensor], notes: Mapping[str, str], config: Mapping[str, Any]) -> Verified:
    """Write a network's file, read it back and compare. Raises: CheckpointError, FileError."""
    from safetensors import safe_open
    from safetensors.torch import save

    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    held |= {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in weights.items()}
    metadata = {"format": "pt", "lycoris_config": json.dumps(dict(config)), **notes}

    def put(draft: Path) -> None:
        draft.write_bytes(save(held, metadata))
        with safe_open(draft, framework="pt") as opened:
            if set(opened.keys()) != set(held):
                raise CheckpointError(f"{path}: names are missing; check the disk")
            for name, tensor in held.items():
                if not torch.equal(opened.get_tensor(name), tensor):
                    raise CheckpointError(f"{path}: {name} does not read back as it was written; check the disk")

    write_with(path, put)
    return Verified(len(held), len(network.loras), 0.0)
