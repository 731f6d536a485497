"""Draw a picture of a run again, from what stands inside it, and compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from sd3tune.config.reading import LEAVES
from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError, FileError
from sd3tune.files import write_with
from sd3tune.models import components
from sd3tune.records import NoticeRecord, Record
from sd3tune.run_folder import RunFolder
from sd3tune.sampling import loaded, run_of, texts_of
from sd3tune.validation.painter import Drawn, Failed, Step
from sd3tune.validation.pictures import Source, about, opened, record_of, source_of
from sd3tune.validation.shots import Shot
from sd3tune.validation.validator import at_strength, painting, preview_of


def redraw(picture: Path) -> Iterator[Record]:
    """Draw a run's picture again in the batch that it was drawn in, with the adapter that it names; the last record says what differs.

    The model is computed as it was then, whatever the run has changed since. The new picture lies in the run's ``replays``.
    Raises: FileError for a picture that is not of a run; CheckpointError when its adapter is gone; ConfigError.
    """
    facts = about(picture)
    folder = run_of(picture)
    if folder is None:
        raise FileError(f"{picture}: lies in no run folder, where its settings and its adapter are; replay the original there")
    shot, batch, step = Shot.of(facts["shot"]), tuple(map(Shot.of, facts["batch"])), int(facts["step"])
    config = RunConfig.load(folder.config).replace(
        validation_prompt=tuple(dict.fromkeys(one.prompt for one in batch)), validation_negative_prompt=shot.negative,
        user_prompt_library={str(i): {"prompt": one.prompt, "negative": one.negative} for i, one in enumerate(batch)},
        validation_disable=False, validation_preview=False,
        **{name: value for name, value in facts["model_settings"].items() if LEAVES.get(name) == "model"},
    )  # fmt: skip
    adapter, device = adapter_of(folder, facts["adapter"]), components.pick_device()
    texts = texts_of(config)
    source = source_of(config, texts, str(device), facts["kind"], step, facts["adapter"])
    found: Drawn | None = None
    with (
        loaded(config, adapter, device) as (transformer, network),
        at_strength(transformer, network, shot.strength) if adapter else nullcontext(),
        painting(config, transformer, texts.text, device) as painter,
    ):
        for event in painter.draw(batch, len(batch)):
            if isinstance(event, Step):
                yield preview_of(event, step)
            elif isinstance(event, Failed):
                raise CheckpointError(f"{picture}: cannot be drawn again: {event.why}")
            elif isinstance(event, Drawn) and event.shot == shot:
                found = event
    assert found is not None, shot
    path = folder.path / "replays" / f"{picture.parent.name}-{picture.name}"
    write_with(path, lambda draft: found.picture.save(draft, "PNG"))
    yield record_of(shot, source, path)
    yield NoticeRecord(step=step, text=verdict(picture, found.picture, facts, source))


def adapter_of(folder: RunFolder, mark: str) -> Path | None:
    """The file of the adapter that a picture names; nothing for the base model. Raises: CheckpointError when it is gone."""
    if not mark:
        return None
    path = folder.adapters / f"{mark}.safetensors"
    if not path.exists():
        raise CheckpointError(f"{path}: the adapter of this picture is gone, so it cannot be drawn again; was the run folder tidied up?")
    return path


def verdict(picture: Path, again: Image.Image, facts: dict[str, Any], now: Source) -> str:
    """Whether two pictures are the same, and what else is not as it was."""
    bands = ImageChops.difference(opened(picture), again).split()
    most = max(int(band.getextrema()[1]) for band in bands)  # type: ignore[arg-type]
    if not most:
        return f"{picture.name}: drawn again, and the same, bit for bit"
    changed = [
        f"{name} {then} then, {now.versions.get(name)} now" for name, then in facts["versions"].items() if now.versions.get(name) != then
    ]
    changed += [f"{facts['device']} then, {now.device} now"] if facts["device"] != now.device else []
    changed += ["the base model or its encoders are not those of then"] if facts["model"] != now.model else []
    return f"{picture.name}: drawn again, and differs by up to {most} of 255" + (f" ({'; '.join(changed)})" if changed else "")
