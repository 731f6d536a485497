"""Encode what is missing.

Groups that are encoded together are a fixed function of the plan (sorted keys, in chunks), and a group with a missing
member is encoded whole: so a build that was killed ends bitwise as one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sd3tune.cache.encoding import STATES, WORKERS, Group, Job, encoded
from sd3tune.cache.findings import findings
from sd3tune.cache.keys import latent_key, text_key
from sd3tune.cache.masking import without_black
from sd3tune.cache.reading import Cache, Coverage, mask_key_of
from sd3tune.cache.states import Encoders, LoadedEncoders
from sd3tune.cache.store import Store
from sd3tune.cache.writing import Writer
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.planning import Plan
from sd3tune.data.seen import Seen, digests
from sd3tune.records import CacheRecord


class CacheBuilder:
    """Iterate to encode a plan: a record per picture that is hashed, text that one encoder read, and entry. `build` does it in one call.

    ``part`` = (rank, of): this process encodes only its share of the groups; a build of all of them then finds every entry.
    Stopping between two records loses nothing, and a later iteration goes on.
    """

    def __init__(self, plan: Plan, encoders: Encoders, *, part: tuple[int, int] = (0, 1)) -> None:
        self.plan, self._encoders, self._part = plan, encoders, part
        self.store = Store(Path(plan.cache_dir))

    def build(self) -> Cache:
        """Encode what is missing. Pictures that cannot be decoded are rows of the cache's plan. Raises: DataError when none is left."""
        return self.cache(list(self))

    def cache(self, records: Sequence[CacheRecord]) -> Cache:
        """The cache of a finished iteration, which yielded ``records``. Raises: DataError when no picture is left to train on."""
        entries = [record for record in records if record.kind not in ("pictures", STATES)]
        broken = {record.name: record.problem for record in records if record.kind == "pictures" and record.problem}
        lost = {r.key: r.problem for r in entries if r.problem and not self.store.has(r.kind, r.key)}
        if lost:  # by key and not by name: the same bytes may lie in several files
            keys = [(cut, key) for cut in self.plan.cuts for key in (mask_key_of(cut), self._latent_key(cut))]
            broken |= {str(cut.item.path): lost[key] for cut, key in keys if key in lost}
        reused = sum(record.reused for record in entries)
        plan = self.plan.without(broken)
        looks = {str(cut.item.path): self.store.facts("latents", self._latent_key(cut)) for cut in plan.cuts}
        plan = findings(plan, looks)
        shares = enumerate(self.store.facts("masks", mask_key_of(cut)).get("coverage") for cut in plan.cuts)
        plan = without_black(plan, dict(shares))
        return Cache(plan, self._encoders, store=self.store, hits=reused, misses=len(entries) - len(lost) - reused)

    def coverage(self) -> Coverage:
        """How much of the plan is encoded already; reads no picture."""
        return Cache(self.plan, self._encoders, store=self.store).coverage()

    def wanted(self) -> Iterator[tuple[str, str, Job]]:
        """Kind, key and job of every entry that the plan needs. Reads pictures that were not hashed yet."""
        for _ in self._hash():
            pass
        yield from ((kind, job.key, job) for kind, jobs in self._groups() for job in jobs)

    def __iter__(self) -> Iterator[CacheRecord]:
        yield from self._hash()
        self.store.refresh()
        groups = self._groups()
        mine = [group for number, group in enumerate(groups) if number % self._part[1] == self._part[0]]
        total, done = sum(len(jobs) for _, jobs in mine), 0
        missing: list[Group] = []
        for kind, jobs in mine:
            wanted = {job.key: said for job, said in zip(jobs, self._problems(kind, jobs), strict=True) if said is not None}
            for job in jobs:
                if job.key not in wanted:
                    done += 1
                    yield CacheRecord(step=done, total=total, kind=kind, key=job.key, name=job.name, reused=True)
            if wanted:
                missing.append(Group(kind, jobs, wanted))
        if missing:
            yield from self._encoded(missing, done, total)

    def _encoded(self, missing: list[Group], done: int, total: int) -> Iterator[CacheRecord]:
        """Encode groups: a record per entry, which count on to the total, and one per text that an encoder read before the last did."""
        texts = sum(len(group.jobs) for group in missing if group.kind == "texts")
        read: Counter[str] = Counter()
        with Writer(self.store, self.plan.write_batch_size) as writer:
            for kind, key, name, said, reused in encoded(missing, self._encoders, self.store, writer):
                if kind == STATES:
                    read[name] += 1
                    yield CacheRecord(step=read[name], total=texts, kind=kind, key=key, name=name, reused=False)
                else:
                    done += 1
                    yield CacheRecord(step=done, total=total, kind=kind, key=key, name=name, reused=reused, problem=said)

    def _problems(self, kind: str, jobs: list[Job]) -> list[str | None]:
        """For each job: ``None`` when its entry is whole, else what should be said when it is encoded."""
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            return list(pool.map(lambda job: self._problem(kind, job.key), jobs))

    def _problem(self, kind: str, key: str) -> str | None:
        if not self.store.has(kind, key):
            return ""
        damage = self.store.damage(kind, key)
        return f"encoded again: {damage}" if damage else None

    def _hash(self) -> Iterator[CacheRecord]:
        """Read the pictures that were not hashed yet, remember their digests, and put them into the plan."""
        unknown = {str(p.item.path): p.item for p in (*self.plan.train, *self.plan.evaluation) if not p.item.pixels}
        found: dict[str, str] = {}
        paths = [item.path for item in unknown.values()]
        for number, (path, pixels, problem) in enumerate(digests(paths), start=1):
            found[str(path)] = pixels
            yield CacheRecord(
                step=number, total=len(paths), kind="pictures", key=pixels, name=str(path), reused=False, problem=problem
            )  # fmt: skip
        if found:
            broken = {path for path, pixels in found.items() if not pixels}
            self.plan = self.plan.hashed(found)
            _remember(self.plan, set(found) - broken)

    def _groups(self) -> list[tuple[str, list[Job]]]:
        return [*self._text_groups(), *self._latent_groups(), *self._mask_groups()]

    def _mask_groups(self) -> list[tuple[str, list[Job]]]:
        jobs = {key: Job(key, str(cut.item.path), cut, "") for cut in self.plan.cuts if (key := mask_key_of(cut))}
        return [("masks", chunk) for chunk in _chunks([jobs[key] for key in sorted(jobs)], self.plan.vae_batch_size)]

    def _text_groups(self) -> list[tuple[str, list[Job]]]:
        mark = self._encoders.text_fingerprint
        jobs = sorted(Job(text_key(text, mark), text, None, text) for text in self.plan.texts)
        return [("texts", chunk) for chunk in _chunks(jobs, self.plan.text_batch_size)]

    def _latent_key(self, cut: Placement) -> str:
        return latent_key(cut.item.pixels, cut.geometry, self._encoders.latent_fingerprint, cut.item.dataset.background)

    def _latent_groups(self) -> list[tuple[str, list[Job]]]:
        by_bucket: dict[Bucket, dict[str, Job]] = {}
        for placement in self.plan.cuts:
            if key := self._latent_key(placement):
                by_bucket.setdefault(placement.bucket, {})[key] = Job(key, str(placement.item.path), placement, "")
        return [
            ("latents", chunk)
            for bucket in sorted(by_bucket)
            for chunk in _chunks([by_bucket[bucket][key] for key in sorted(by_bucket[bucket])], self.plan.vae_batch_size)
        ]


def _remember(plan: Plan, paths: set[str]) -> None:
    """Keep the digests of these files for the next time."""
    for dataset in plan.catalog.datasets:
        seen = Seen(dataset.instance_data_dir or dataset.dataset_name or "")
        items = [item for item in plan.catalog.items if item.dataset == dataset and item.found]
        for item in items:
            if item.found and str(item.path) in paths:
                seen.put(item.found, (item.width, item.height, item.pixels, item.focus))
        seen.save([item.found.name for item in items if item.found])


def _chunks(jobs: list[Job], size: int) -> list[list[Job]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


__all__ = ["Cache", "CacheBuilder", "Group", "Job", "LoadedEncoders"]
