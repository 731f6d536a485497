"""Models from the Hugging Face hub: what is in the local cache first, then room on the disk, then the download."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sd3tune.errors import ModelError
from sd3tune.secrets import without_secrets

FLAVOURS = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
}
"""Known models and where they are."""

PARTS = ("transformer", "vae", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
PATTERNS = ("model_index.json", *(f"{part}/*" for part in PARTS))
"""What is fetched: not the single files for other tools that lie in the same repositories."""

MIRROR = "https://hf-mirror.com"

INSTEAD = "name a folder with pretrained_model_name_or_path"
"""What else can be done when a base model cannot be fetched."""


def is_name(text: str) -> bool:
    """Whether this can be a model's name on the hub, ``owner/name``."""
    owner, _, name = text.partition("/")
    return bool(owner and name) and "/" not in name and not text.startswith((".", "~", "/")) and "\\" not in text


def fetched(name: str, *, revision: str | None = None, without: tuple[str, ...] = (), bare: tuple[str, ...] = ()) -> Path:
    """The folder of a model of the hub, downloaded if it is not there yet, without parts that are not needed or with their config alone.

    ``HF_ENDPOINT`` is read at each call. Raises: ModelError that says which of token, licence, scope, name, network or disk is the matter.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    endpoint = os.environ.get("HF_ENDPOINT") or None
    wanted = [part for part in PARTS if part not in without]
    patterns = [p for p in PATTERNS if p.split("/")[0] not in (*without, *bare)] + [f"{part}/config.json" for part in bare]
    chosen: dict[str, Any] = {
        "revision": revision, "allow_patterns": patterns, "endpoint": endpoint,
    }  # fmt: skip
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **chosen))
        if all((folder / part).is_dir() for part in wanted):
            return folder
    except (OSError, errors.HFValidationError):
        pass  # not there, or not whole
    try:
        info = HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True)
        check_room(name, sum(f.size or 0 for f in info.siblings or [] if f.rfilename.split("/")[0] in set(wanted) - set(bare)))
        return Path(snapshot_download(name, **chosen))
    except (OSError, HTTPError, errors.HFValidationError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(f"{name}: {explained(error, name)}") from None


def folder_of(name: str, *, weights: Sequence[str], instead: str) -> Path:
    """The folder of a small model: the one named, or fetched from the hub with the first kind of ``weights`` (patterns) that is there.

    ``instead`` is what else can be set. Raises: ModelError that says what is the matter.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_name(name):
        raise ModelError(f"{Path(name).resolve()}: no such folder; {instead}")
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    endpoint, rest = os.environ.get("HF_ENDPOINT") or None, ["*.json", "*.txt"]
    for kind in weights:
        with suppress(OSError, errors.HFValidationError):  # not there, or not whole
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=[*rest, kind], endpoint=endpoint))
            if (folder / "config.json").is_file() and list(folder.glob(kind)):
                return folder
    try:
        files = HfApi(endpoint=endpoint).model_info(name, files_metadata=True).siblings or []
        kind = next((kind for kind in weights if any(fnmatch(file.rfilename, kind) for file in files)), weights[0])
        wanted = [*rest, kind]
        check_room(name, sum(file.size or 0 for file in files if any(fnmatch(file.rfilename, one) for one in wanted)))
        return Path(snapshot_download(name, allow_patterns=wanted, endpoint=endpoint))
    except (OSError, HTTPError, errors.HFValidationError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(f"{name}: {explained(error, name, instead)}") from None


def table(path: Path, instead: str) -> dict[str, Any]:
    """What a JSON file of a model holds. Raises: ModelError when it is not there, or no table; ``instead`` is what else can be set."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); {instead}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no table; {instead}")
    return found


def late_endpoint() -> str:
    """What to say when ``HF_ENDPOINT`` was set after huggingface_hub was imported, which reads it once; the empty text otherwise."""
    from huggingface_hub import constants

    wanted, used = os.environ.get("HF_ENDPOINT", "").rstrip("/"), constants.ENDPOINT.rstrip("/")
    if not wanted or wanted == used:
        return ""
    return (
        f"HF_ENDPOINT={wanted} was set too late for models of captions and masks, which still come from {used}: huggingface_hub reads it "
        f"once, when it is imported. Base models come from the new one. Set it before Python starts: export HF_ENDPOINT={MIRROR}"
    )


def has_token() -> bool:
    """Whether there is a token for the hub; it is never shown."""
    from huggingface_hub import get_token

    return bool(get_token())


def explained(error: BaseException, name: str, instead: str = INSTEAD) -> str:
    """What is the matter with a model of the hub, and what to do; never with a token in it."""
    return without_secrets(_explained(error, name, instead))


def _explained(error: BaseException, name: str, instead: str) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = str(error).lower()
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"it is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or {instead}"
    if "fine-grained" in text or "token permission" in text or "insufficient permission" in text:
        return (
            "your token has not the scope for it; on https://huggingface.co/settings/tokens let it read public gated repositories, "
            "or make a token of type read"
        )
    if isinstance(error, errors.GatedRepoError) and not has_token():
        return f"it is gated, and there is no token; accept its licence on {page}, then run: hf auth login (or set HF_TOKEN)"
    if isinstance(error, errors.GatedRepoError):
        return f"its licence is not accepted yet by the account of your token; accept it on {page}, and try again"
    if status == 401 and has_token() and "repository not found" not in text:
        return "your token is not valid (any more); run: hf auth login, with a new one"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision; the page {page}/tree/main lists them"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return "there is no such model on the hub (or it is private, and the token does not open it), and no such folder here"
    if status is not None:
        return f"the hub answers {status}; try again later ({str(error).splitlines()[0]})"
    return f"the hub cannot be reached ({type(error).__name__}); check the network, or set HF_ENDPOINT={MIRROR} (a mirror), or {instead}"


def check_room(name: str, size: int) -> None:
    """Raises: ModelError when the disk of the local cache has not room for ``size`` bytes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    there = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ModelError(
            f"{name} needs {size / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free; make room, or set HF_HOME to another disk"
        )
