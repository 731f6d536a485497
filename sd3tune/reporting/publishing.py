"""The hub: a repository made before training, checkpoints on the way, and the adapter with its card at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError, ConfigError, ModelError
from sd3tune.files import write_text
from sd3tune.listing import as_set, at_its_end
from sd3tune.models.hub import has_token
from sd3tune.records import CheckpointRecord, Record
from sd3tune.reporting.card import card, newest_pictures
from sd3tune.reporting.cleaning import without_secrets
from sd3tune.reporting.tail import RefusedError
from sd3tune.run_folder import RunFolder

PAUSES = (2.0, 10.0, 30.0)
"""Seconds between two tries of an upload."""

OFFLINE = "HF_HUB_OFFLINE is set"

SETTINGS = "https://huggingface.co/settings/tokens"


def default_api() -> Any:
    """The hub that ``HF_ENDPOINT`` names."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def wanted_name(config: RunConfig) -> str:
    """The repository's name as it is asked for."""
    return config.reporting.hub_model_id or Path(config.run.output_dir).name


def open_repository(config: RunConfig, api: Any, *, ask: bool = False) -> tuple[str, str]:
    """Make the repository, or find it: its full name, and what hinders if the hub cannot be reached.

    ``ask`` looks at the token's rights too, for a repository that is there already would hide that it may only read.
    Raises: ConfigError when the hub says no (no token, no right to write, a bad name).
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    name = wanted_name(config)
    if constants.HF_HUB_OFFLINE:
        return name, OFFLINE
    if not has_token():
        raise ConfigError([f"push_to_hub: there is no token; run: hf auth login, with a token of type write ({SETTINGS}), or set HF_TOKEN"])
    try:
        if ask and (problem := write_problem(api.whoami(), name)):
            raise ConfigError([f"push_to_hub: {problem}"])
        return str(api.create_repo(name, private=config.reporting.model_card_private, exist_ok=True).repo_id), ""
    except errors.HFValidationError as error:
        raise ConfigError([f"hub_model_id: {without_secrets(str(error))}"]) from None
    except (OSError, HTTPError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (400, 401, 403, 404):
            raise ConfigError([f"push_to_hub: the hub does not let you make {name} ({status}); {_way_out(status, name)}"]) from None
        return name, f"the hub cannot be reached now ({type(error).__name__}{f', it answers {status}' if status else ''})"


def _way_out(status: int, name: str) -> str:
    if status == 401:
        return "your token is not valid (any more); run: hf auth login, with a new one of type write"
    if status == 403:
        return f"your token may not write there; make one of type write on {SETTINGS}, or give it write access to this owner's repositories"
    return f"check hub_model_id: {name}"


def write_problem(answer: Mapping[str, Any], name: str) -> str:
    """Why the token of a ``whoami`` answer cannot write to a repository; empty when it can. The answer holds no token."""
    token = (answer.get("auth") or {}).get("accessToken") or {}
    role, owner = token.get("role"), name.partition("/")[0] if "/" in name else str(answer.get("name"))
    known = {str(answer.get("name")), *(str(org.get("name")) for org in answer.get("orgs") or [])}
    if owner not in known:
        return f"hub_model_id: {owner} is neither you ({answer.get('name')}) nor an organisation of yours"
    if role == "read":
        return f"your token may only read; make one of type write on {SETTINGS}"
    if role != "fineGrained":
        return ""
    for scope in (token.get("fineGrained") or {}).get("scoped") or []:
        entity = scope.get("entity") or {}
        if entity.get("name") in (owner, name) and "repo.write" in scope.get("permissions", ()):
            return ""
    return f"your fine-grained token may not write to repositories of {owner}; add that on {SETTINGS}"


class Publisher:
    """Uploads checkpoints, if asked, and at the end the adapter with its card."""

    name = "hub"

    def __init__(self, config: RunConfig, folder: RunFolder, api: Any = None, *, pauses: tuple[float, ...] = PAUSES) -> None:
        self._config, self._folder, self._api, self._pauses = config, folder, api or default_api(), pauses
        self._written = False

    def wants(self, record: Record) -> bool:
        """Checkpoints, if they are to be pushed, and that the final adapter is there."""
        return isinstance(record, CheckpointRecord) and (self._config.reporting.push_checkpoints_to_hub or self._is_final(record))

    def _is_final(self, record: CheckpointRecord) -> bool:
        return Path(record.path) == self._folder.lora

    def send(self, record: Record) -> None:
        """Upload one checkpoint; the final adapter follows at the end, with its card."""
        assert isinstance(record, CheckpointRecord)
        if self._is_final(record):
            self._written = True
            return
        path = Path(record.path)
        name, hindrance = open_repository(self._config, self._api)
        if hindrance:
            raise ModelError(hindrance)
        files = {f"checkpoints/{path.name}/{file.name}": file for file in sorted(path.glob("*")) if file.is_file()}
        if not files:
            raise RefusedError("it was dropped for a newer one before its turn")
        upload(self._api, name, files, f"step {record.step}")

    def finish(self) -> str:
        """Upload the adapter, if the run has come to its end; where it is now."""
        if not self._written or not at_its_end(self._folder, self._folder.read_history()):
            return ""
        self._written = False
        try:
            return publish(self._folder, as_set(self._folder), self._api, pauses=self._pauses)
        except ConfigError as error:
            return f"{'; '.join(error.problems)}; then: sd3tune push {self._folder.path}"


def upload(api: Any, name: str, files: Mapping[str, Path], message: str) -> None:
    """One commit of files. Raises: what the hub's client raises."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=place, path_or_fileobj=str(path)) for place, path in files.items()]
    api.create_commit(repo_id=name, operations=operations, commit_message=message)


def publish(folder: RunFolder, config: RunConfig, api: Any = None, *, pauses: tuple[float, ...] = PAUSES) -> str:
    """Upload a finished run's adapter with its card, and say where. Raises: ConfigError, CheckpointError, ModelError."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    if not folder.lora.exists():
        raise CheckpointError(f"{folder.path}: there is no lora.safetensors yet; the run has not come to its end")
    if not at_its_end(folder, folder.read_history()):
        raise CheckpointError(
            f"{folder.path}: the run went on after lora.safetensors was written, and has not come to its end; finish it first: "
            f"sd3tune train --resume {folder.path}"
        )
    api, why = api or default_api(), ""
    write_card(folder, config)
    for pause in (*pauses, None):
        name, why = open_repository(config, api)
        if not why:
            try:
                upload(api, name, files_of(folder), f"{folder.path.name}: adapter and model card")
                return f"the adapter is at {api.endpoint}/{name}"
            except (OSError, ValueError, HTTPError, errors.HfHubHTTPError) as error:  # ValueError: the hub does not like the card
                why = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
        if why == OFFLINE or pause is None:
            break
        time.sleep(pause)
    raise ModelError(f"{wanted_name(config)}: {why}; adapter and card are in {folder.path}, and later: sd3tune push {folder.path}")


def write_card(folder: RunFolder, config: RunConfig) -> None:
    """Write README.md into a run folder. Raises: FileError."""
    write_text(folder.card, card(folder, config, wanted_name(config)))


def files_of(folder: RunFolder) -> dict[str, Path]:
    """What is uploaded: place in the repository -> file."""
    found = {path.name: path for path in (folder.card, folder.lora, folder.lora_ema, folder.grid) if path.exists()}
    return found | {f"images/{path.name}": path for path in newest_pictures(folder)}
