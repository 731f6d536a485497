"""Which of several adapters draws better: blind votes between pairs of pictures, and what they say. No models here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from sd3tune.errors import ConfigError
from sd3tune.files import digest
from sd3tune.history import History, read_lines
from sd3tune.records import Record
from sd3tune.shown import Shown
from sd3tune.validation.grids import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

Answer = Literal["left", "right", "same"]
LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True, order=True)
class Candidate:
    """An adapter that could be the chosen one: a checkpoint at a strength."""

    step: int
    strength: float = 1.0
    mark: str = field(default="", repr=False)
    """SHA-256 of the checkpoint's adapter: another checkpoint of the same step is another candidate."""

    def __str__(self) -> str:
        return f"step {self.step}" + (f" x {self.strength:g}" if self.strength != 1 else "")


@dataclass(frozen=True, order=True)
class Pair:
    """Two candidates to compare by their pictures of one shot (its key)."""

    one: Candidate
    other: Candidate
    shot: str

    @property
    def key(self) -> str:
        """What it is, whichever comes first."""
        sides = sorted(f"{candidate.mark} {candidate.strength!r}" for candidate in (self.one, self.other))
        return digest(*sides, self.shot)


def pairs_of(candidates: Sequence[Candidate], shots: Sequence[str]) -> list[Pair]:
    """Every two candidates at every shot."""
    return [Pair(one, other, shot) for shot in shots for one, other in combinations(candidates, 2)]


def shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Pairs in an order and with sides that are a function of the seed and of each pair alone: more of them move none."""

    def drawn(pair: Pair, what: str) -> str:
        return digest(str(seed), what, pair.key)

    ordered = sorted(pairs, key=lambda pair: drawn(pair, "order"))
    return [_turned(pair) if int(drawn(pair, "sides")[:8], 16) % 2 else pair for pair in map(_sorted, ordered)]


def _sorted(pair: Pair) -> Pair:
    one, other = sorted((pair.one, pair.other), key=lambda candidate: (candidate.mark, candidate.strength))
    return Pair(one, other, pair.shot)


def _turned(pair: Pair) -> Pair:
    return Pair(pair.other, pair.one, pair.shot)


@dataclass(frozen=True)
class Ballot:
    """Two pictures of one prompt, without saying whose they are. Displays itself in a notebook."""

    number: int
    """Which of the questions that are still to be asked."""
    of: int
    prompt: str
    left: Image = field(repr=False, compare=False)
    right: Image = field(repr=False, compare=False)
    _pair: Pair = field(repr=False)
    """Left and right."""
    _seed: int = field(repr=False)

    def _repr_png_(self) -> bytes:
        return Grid(((f"{self.number} of {self.of}", (self.left, self.right)),), ("left", "right")).png()


def ballots(pairs: Sequence[Pair], seed: int, picture: Callable[[Candidate, str], Image], prompts: Mapping[str, str]) -> Iterator[Ballot]:
    """The questions that some pairs are, in the seed's order; ``prompts`` are by the shots' keys."""
    for number, pair in enumerate(shuffled(pairs, seed), start=1):
        left, right = (_bare(picture(candidate, pair.shot)) for candidate in (pair.one, pair.other))
        yield Ballot(number, len(pairs), prompts[pair.shot], left, right, pair, seed)


def _bare(picture: Image) -> Image:
    """A picture without the texts of its file, which name the step."""
    from PIL import Image

    return Image.frombytes(picture.mode, picture.size, picture.tobytes())


@dataclass(frozen=True, kw_only=True)
class VoteRecord(Record):
    """A person's answer; ``step`` counts them."""

    type: ClassVar[str] = "vote"
    left: Candidate
    right: Candidate
    shot: str
    answer: Answer
    seed: int = 0
    """Of the ballots: with another seed every pair is asked again."""

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> VoteRecord:
        """Undo ``as_dict``. Raises: KeyError, TypeError."""
        left, right = Candidate(**row["left"]), Candidate(**row["right"])
        return cls(step=row["step"], left=left, right=right, shot=row["shot"], answer=row["answer"], seed=row["seed"])

    @property
    def key(self) -> str:
        """Of the pair."""
        return Pair(self.left, self.right, self.shot).key


def answered(ballot: Ballot, answer: Any, count: int) -> VoteRecord:
    """The record of an answer, after ``count`` others. Raises: ConfigError for what is no answer."""
    if answer not in get_args(Answer):
        raise ConfigError([f"{answer!r} is no answer; say 'left', 'right' or 'same'"], "vote")
    pair = ballot._pair
    return VoteRecord(step=count + 1, left=pair.one, right=pair.other, shot=pair.shot, answer=answer, seed=ballot._seed)


def write_vote(path: Path, vote: VoteRecord) -> None:
    """Append a vote; it is on the disk when this returns. Raises: FileError."""
    history = History(path)
    try:
        history.append(vote)
        history.sync()
    finally:
        history.close()


def read_votes(path: Path) -> tuple[VoteRecord, ...]:
    """The votes of a file; lines that are torn or of something else are left out."""
    found = []
    for row in read_lines(path):
        try:
            found.append(VoteRecord.of_row(row))
        except (KeyError, TypeError):
            continue
    return tuple(vote for vote in found if vote.answer in get_args(Answer))


# --- what votes say ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """What became of a candidate: the share of its votes that it won, ties as halves, with the 95 % interval of that share."""

    candidate: Candidate
    votes: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        if not self.votes:
            return f"{self.candidate}: no votes yet"
        return f"{self.candidate}: won {self.share:.0%} ({self.low:.0%} to {self.high:.0%}) of {self.votes}"


@dataclass(frozen=True, repr=False)
class Ranking(Shown):
    """Candidates, best first, after some votes."""

    standings: tuple[Standing, ...]
    votes: int

    @property
    def clear(self) -> bool:
        """Whether the first is better than each of the others: no other interval reaches its own."""
        first, *others = self.standings
        return bool(first.votes) and all(first.low > other.high for other in others)

    def __str__(self) -> str:
        if not self.votes:
            return "no votes yet"
        said = "is better than the others" if self.clear else "leads, but its interval overlaps with others': more votes would tell"
        how = "shares won with ties as halves, 95 % intervals by Wilson"
        return "\n".join([f"{self.standings[0].candidate} {said} ({self.votes} votes; {how})", *map(str, self.standings)])


def ranking(votes: Sequence[VoteRecord], candidates: Sequence[Candidate]) -> Ranking:
    """The candidates by the share of their votes that they won; votes on others do not count.

    An unasked candidate has a share of one half that nothing is known of. Each vote counts as independent of the others.
    """
    known = set(candidates)
    counted = [vote for vote in votes if {vote.left, vote.right} <= known]
    points = dict.fromkeys(candidates, 0.0)
    asked = dict.fromkeys(candidates, 0)
    for vote in counted:
        won = {"left": 1.0, "right": 0.0, "same": 0.5}[vote.answer]
        points[vote.left] += won
        points[vote.right] += 1 - won
        asked[vote.left] += 1
        asked[vote.right] += 1
    found = []
    for candidate in candidates:
        share = points[candidate] / asked[candidate] if asked[candidate] else 0.5
        found.append(Standing(candidate, asked[candidate], share, *wilson(share, asked[candidate])))
    return Ranking(tuple(sorted(found, key=lambda standing: (-standing.share, -standing.votes, standing.candidate))), len(counted))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in ``count`` votes. Source: Wilson 1927; with ties as halves it is too wide, not too
    narrow."""
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
