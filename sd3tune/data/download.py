"""Fetching a data set of the hub into a folder: room on the disk first, then file by file; what is there is not fetched again."""

from __future__ import annotations

import shutil
from pathlib import Path

from sd3tune.errors import DataError
from sd3tune.secrets import without_secrets

GUIDE = "bghira/pseudo-camera-10k"
"""The data set that SimpleTuner's guide trains on."""

MARK = Path(".cache") / "huggingface"
"""What huggingface_hub leaves in a folder that it fetched into."""


def download_dataset(name: str = GUIDE, to: str | Path | None = None, *, endpoint: str | None = None) -> Path:
    """Fetch a data set of the hub and return its folder; called again, it goes on where it stopped.

    Without ``to`` it goes into ``datasets/`` below the working folder. ``endpoint`` is a mirror of the hub.
    Raises: DataError when there is no such data set, no access, no network or no room; nothing else is changed then.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client this version uses

    folder = Path(to) if to else Path("datasets") / name.split("/")[-1]
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file stands there; give another folder with --to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DataError(f"{folder}: there are other files in it; give a new folder with --to")
    try:
        info = HfApi(endpoint=endpoint).dataset_info(name, files_metadata=True)
        check_room(folder, sum(file.size or 0 for file in info.siblings or []), name)
        snapshot_download(name, repo_type="dataset", revision=info.sha, local_dir=folder, endpoint=endpoint)
    except errors.GatedRepoError:
        raise DataError(f"{name}: its licence must be accepted first, on https://huggingface.co/datasets/{name}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DataError(f"{name}: there is no such data set on the hub, or it is private; it is written owner/name") from None
    except errors.OfflineModeIsEnabled:
        raise DataError(f"{name}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it") from None
    except (OSError, HTTPError, errors.HfHubHTTPError) as error:  # what was fetched stays, for the next time
        raise DataError(f"{name}: cannot be fetched ({without_secrets(str(error))}); try again, it goes on where it stopped") from None
    return folder


def check_room(folder: Path, size: int, name: str) -> None:
    """Raises: DataError when the disk has not room for ``size`` bytes."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    if size - held > free:
        raise DataError(
            f"{name} needs {size / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free; make room, or choose another disk with --to"
        )
