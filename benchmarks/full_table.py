"""The table of a complete ``make test-full``, from the file that it leaves: for each part what passed, and in how long.

Rows that were run again, with files of their own, count as they were the last time.
python benchmarks/full_table.py FULL.xml [AGAIN.xml ...]
"""

from __future__ import annotations

import argparse
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("xml", type=Path, nargs="+")
    print(table(parser.parse_args().xml))


def table(files: Sequence[Path]) -> str:
    """A line for each test with its rows, and one for all of them."""
    cases = {(case.attrib["classname"], case.attrib["name"]): case for xml in files for case in ElementTree.parse(xml).iter("testcase")}
    outcomes: dict[tuple[str, str], list[str]] = defaultdict(list)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for case in cases.values():
        name = (case.attrib["classname"].rpartition(".")[2], case.attrib["name"].partition("[")[0])
        outcomes[name].append(next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"))
        seconds[name] += float(case.attrib["time"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    lines = [
        f"`make test-full` at commit {commit}.",
        "",
        "| test | rows | passed | skipped | failed | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    everything = [one for found in outcomes.values() for one in found]
    rows = [*((f"{file}: {test}", outcomes[file, test], seconds[file, test]) for file, test in outcomes)]
    for name, found, took in [*rows, ("**all**", everything, sum(seconds.values()))]:
        passed, skipped = found.count("passed"), found.count("skipped")
        lines.append(f"| {name} | {len(found)} | {passed} | {skipped} | {len(found) - passed - skipped} | {took:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
