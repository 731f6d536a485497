"""Choosing a checkpoint: pictures of candidates side by side, blind votes on them, and a file of the one that is chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sd3tune.candidates import Promoted, adapter_file, config_at, promote, weights_of, whole_checkpoints
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError, ModelError, TrainingError
from sd3tune.files import digest
from sd3tune.history import newest_chain, read_lines
from sd3tune.models import components
from sd3tune.models.lora_layouts import Layout
from sd3tune.records import EvalRecord, NoticeRecord, Record, ScoreRecord
from sd3tune.run_folder import RunFolder
from sd3tune.sampling import exchange, loaded, texts_of
from sd3tune.shown import duration
from sd3tune.validation import votes
from sd3tune.validation.grids import Grid
from sd3tune.validation.history_grid import Rows, about_grid
from sd3tune.validation.painter import seconds_of_a_forward
from sd3tune.validation.pictures import Found, cell_of, drawn, found_at, model_settings, of_shots, opened, source_of, title
from sd3tune.validation.scoring import Scoring
from sd3tune.validation.shots import Shot, shots_of, together
from sd3tune.validation.validator import at_strength, check, draw, painting
from sd3tune.validation.votes import Answer, Ballot, Candidate, Ranking


class Picker:
    """Checkpoints of a run at some strengths (rows) x prompts (columns). Iterate to draw what is not drawn yet; it shows what is there.

    Pictures lie in the run's ``picks``, each under the digest of its adapter, model and shot, so that another picker finds them, on another
    machine, too. What validation drew already with the same adapter is used as it is. ``prompts`` replace the run's own, and ``settings``
    are those of validation. A candidate's strength is the whole of it, whatever ``validation_adapter_strength`` says.
    Raises: CheckpointError when the run or a step is not there; ConfigError for settings that are wrong and when there is no prompt.
    """

    def __init__(
        self, run: str | Path, prompts: str | Sequence[str] | None = None, strengths: float | Sequence[float] = (1.0,),
        steps: int | Sequence[int] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.folder = RunFolder.of(run)
        marks = whole_checkpoints(self.folder, (steps,) if isinstance(steps, int) else steps)
        if not marks:
            raise ConfigError(["steps is empty; leave it out for all checkpoints"], "the picker")
        self._own = config_at(self.folder, max(marks))
        self.config = _with(self._own, prompts, settings)
        shares = tuple(dict.fromkeys((strengths,) if isinstance(strengths, int | float) else strengths))
        for share in shares:
            self.config.replace(validation_adapter_strength=share)  # says what is wrong with it
        self.candidates = tuple(Candidate(step, float(share), mark) for step, mark in sorted(marks.items()) for share in shares)
        """Rows, oldest checkpoint first."""
        self.shots = tuple(dict.fromkeys(shot.base for shot in shots_of(self.config)))
        """Columns; what a candidate draws has its strength."""
        if not self.shots or not self.candidates:
            raise ConfigError(["there is nothing to draw: name a prompt, and a strength"], "the picker")
        self.losses = _losses(self.folder)
        """Step -> loss on the held-out pictures, where it was measured."""
        self.scores: dict[Candidate, ScoreRecord] = {}
        """How well pictures follow their prompts; empty unless ``evaluation_type`` is clip."""
        self._each: float | None = None

    # --- pictures ----------------------------------------------------------------------------------------------------

    def place(self, candidate: Candidate, shot: Shot) -> Path:
        """Where a picture is drawn to. Its name does not tell whose it is."""
        row = replace(shot, strength=candidate.strength).as_dict()
        model = json.dumps(dataclasses.asdict(self.config.model))
        return self.folder.picks / f"{digest(candidate.mark, model, json.dumps(row))}.png"

    def row(self, candidate: Candidate) -> list[Found | None]:
        """For each shot the picture that is there, or why it could not be drawn; nothing when it was not tried yet."""
        own, how = drawn(self.folder, candidate.step) if self._own.model == self.config.model else [], model_settings(self.config)
        same = [found for found in own if found.adapter == candidate.mark and found.model_settings == how and found.path.exists()]
        usable = {found.shot: found for found in same}
        found = []
        for shot in self.shots:
            path = self.place(candidate, shot)
            mine = None if path.exists() else usable.get(replace(shot, strength=candidate.strength))
            found.append(mine or found_at(path.with_suffix(".json")))
        return found

    def _there(self, candidate: Candidate) -> dict[Shot, Found]:
        return {shot: at for shot, at in zip(self.shots, self.row(candidate), strict=True) if at is not None and at.path.exists()}

    def _missing(self) -> dict[Candidate, list[Shot]]:
        """What is to be drawn: whole batches in which a picture is missing, for its last bits depend on those beside it."""
        most, wanted = self.config.validation.validation_batch_size, {}
        for candidate in self.candidates:
            there = self._there(candidate).keys()
            batches = [batch for batch in together(self.shots, most) if not there >= {*batch}]
            if batches:
                wanted[candidate] = [replace(shot, strength=candidate.strength) for batch in batches for shot in batch]
        return wanted

    @property
    def price(self) -> str:
        """What drawing the rest costs; how long it takes is known once a step was timed."""
        shots = [shot for rows in self._missing().values() for shot in rows]
        if not shots:
            return f"all {len(self.candidates) * len(self.shots)} pictures are there"
        forwards = sum(shot.forwards for shot in shots)
        took = "; the first step tells how long they take" if self._each is None else f": about {duration(forwards * self._each)}"
        return f"{len(shots)} pictures, {forwards} forwards of the model{took}"

    def __iter__(self) -> Iterator[Record]:
        """Draw what is not drawn yet: the price comes first, then a record per step of the sampler and per picture, then the scores."""
        missing = self._missing()
        if missing:
            yield from self._draw(missing)
        else:
            yield NoticeRecord(step=self.candidates[-1].step, text=self.price)
        if self.config.evaluation.evaluation_type == "clip":
            yield from self._score()
        rows = self._rows()
        self._grid(rows).save(self.grid_file, about_grid(self.config, self.folder, self.shots, rows))

    @property
    def grid_file(self) -> Path:
        """Where the grid is saved."""
        return self.folder.picks / "grid.png"

    def _draw(self, missing: dict[Candidate, list[Shot]]) -> Iterator[Record]:
        """Load the base once and exchange the adapter's values."""
        config, device, first = self.config, components.pick_device(), next(iter(missing))
        check(config, components.skeleton(config), device)
        texts = texts_of(config)
        with (
            loaded(config, adapter_file(self.folder, first.step), device) as (transformer, network),
            painting(config, transformer, texts.text, device) as painter,
        ):
            self._each = seconds_of_a_forward(painter, next(together(missing[first], config.validation.validation_batch_size)))
            yield NoticeRecord(step=first.step, text=self.price)
            for candidate, shots in missing.items():
                weights = weights_of(self.folder, config, candidate)
                exchange(transformer, network, weights, f"{self.folder.path}, step {candidate.step}")
                source = source_of(config, texts, str(device), "adapter", candidate.step, self.folder.keep_adapter(weights))
                with at_strength(transformer, network, candidate.strength):
                    yield from draw(painter, shots, source, partial(self.place, candidate))

    def _score(self) -> Iterator[Record]:
        scoring = Scoring(components.pick_device())
        base = of_shots(self.folder, 0, "base", self.shots)
        for candidate in self.candidates:
            rows = self._there(candidate)
            try:
                record = scoring.of_drawn(self.config, "adapter", [*rows.values()], base, None, candidate.step)
            except ModelError as error:
                yield NoticeRecord(step=candidate.step, text=f"pictures are not scored: {error}")
                return
            if record is not None:
                self.scores[candidate] = record
                yield record

    def grid(self) -> Grid:
        """What is drawn so far: a row for each candidate, with its loss on held-out pictures and its mean CLIP score."""
        return self._grid(self._rows())

    def _rows(self) -> Rows:
        return [("\n".join([str(one), *self._figures(one)]), self.row(one)) for one in self.candidates]

    def _grid(self, rows: Rows) -> Grid:
        cells = tuple((label, tuple(map(cell_of, row))) for label, row in rows)
        return Grid(cells, tuple(title(shot, self.shots) for shot in self.shots))

    def _figures(self, candidate: Candidate) -> list[str]:
        loss, score = self.losses.get(candidate.step), self.scores.get(candidate)
        at = "" if candidate.strength == 1 else " at 1"  # evaluation knows no other strength
        return ([] if loss is None else [f"loss {loss:.4f}{at}"]) + ([] if score is None else [f"CLIP {score.mean:.3f}"])

    def _repr_png_(self) -> bytes:
        return self.grid().png()

    def __str__(self) -> str:
        lines = [self.price]
        for candidate in self.candidates:
            count = f"{len(self._there(candidate))} of {len(self.shots)} pictures"
            lines.append(", ".join([str(candidate), *self._figures(candidate), count]))
        return "\n".join(lines)

    # --- votes -------------------------------------------------------------------------------------------------------

    @property
    def votes_file(self) -> Path:
        """Where the votes are; a line is added with each."""
        return self.folder.picks / "votes.jsonl"

    def ballots(self, seed: int = 0) -> Iterator[Ballot]:
        """Two pictures of one prompt at a time, without saying whose, in an order that is a function of the seed.

        Every pair that was drawn is asked once; what was voted on with this seed is left out, so that voting can go on later. Another
        seed asks everything again. Raises: TrainingError when there are no two pictures to compare.
        """
        keys = {digest(json.dumps(shot.as_dict())): shot for shot in self.shots}
        rows = {one: self._there(one) for one in self.candidates}
        there = {(one, key): row[shot].path for one, row in rows.items() for key, shot in keys.items() if shot in row}
        drawn_pairs = [p for p in votes.pairs_of(self.candidates, list(keys)) if {(p.one, p.shot), (p.other, p.shot)} <= there.keys()]
        if not drawn_pairs:
            raise TrainingError("there are no two pictures to compare yet: iterate over a picker of two or more candidates first")
        asked = {vote.key for vote in votes.read_votes(self.votes_file) if vote.seed == seed}
        left = [pair for pair in drawn_pairs if pair.key not in asked]
        yield from votes.ballots(left, seed, lambda one, key: opened(there[one, key]), {key: shot.prompt for key, shot in keys.items()})

    def vote(self, ballot: Ballot, answer: Answer) -> None:
        """Write down whether the left or the right picture is better, or both are the same. Raises: ConfigError, FileError."""
        votes.write_vote(self.votes_file, votes.answered(ballot, answer, len(votes.read_votes(self.votes_file))))

    def ranking(self) -> Ranking:
        """What all votes on these candidates say, whatever the prompts were."""
        return votes.ranking(votes.read_votes(self.votes_file), self.candidates)

    def promote(
        self, candidate: Candidate | int, path: str | Path | None = None, *, layout: Layout = "diffusers", fold: bool = False
    ) -> Promoted:
        """Write the adapter of a candidate (or of a step, at strength 1) to a file of its own; see `candidates.promote`."""
        return promote(self.folder, candidate_of(candidate), path, layout=layout, fold=fold)


def candidate_of(found: Candidate | int) -> Candidate:
    """A step as the candidate of strength 1."""
    return Candidate(found) if isinstance(found, int) else found


def _with(config: RunConfig, prompts: str | Sequence[str] | None, settings: dict[str, Any]) -> RunConfig:
    """A run's settings with other prompts and other settings. Raises: ConfigError."""
    own: dict[str, Any] = {"validation_disable": False}
    if prompts is not None:
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ConfigError(["a prompt is empty; write what to draw"], "the picker")
        own |= {
            "validation_prompt": texts, "validation_prompt_library": False, "user_prompt_library": None,
            "validation_disable_unconditional": True,
        }  # fmt: skip
    return config.replace(**{**own, **settings})


def _losses(folder: RunFolder) -> dict[int, float]:
    """Step -> held-out loss, of the evaluations that lead to where the run is now."""
    lines = read_lines(folder.history)
    chain = newest_chain(lines)
    rows = [row for row in lines if row["type"] == EvalRecord.type and row["step"] <= chain.get(row.get("segment", 0), -1)]
    return {row["step"]: row["loss"] for row in rows if isinstance(row["loss"], float)}
