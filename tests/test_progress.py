"""The bar of a cache builder."""

from __future__ import annotations

import pytest

from sd3tune.progress import building
from sd3tune.records import CacheRecord


def test_a_stretch_of_the_builder_has_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    records = [CacheRecord(step=i, total=3, kind="pictures", key="", name="a.png", reused=False) for i in (1, 2, 3)]
    records += [CacheRecord(step=i, total=40, kind="texts", key="", name="a", reused=True) for i in range(1, 41)]
    assert list(building(records)) == records
    lines = capsys.readouterr().err.split("\n")
    assert len([line for line in lines if "reading" in line]) == 1
    assert len([line for line in lines if "encoding" in line]) == 1
    assert "3/3" in lines[0]
    assert "40/40" in lines[1]
