"""``sd3tune settings``: every declaration in words, in a terminal, in a pipe, and as the page in ``docs``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_presets import CASES

import sd3tune as st
from sd3tune import cli
from sd3tune.config import explaining
from sd3tune.config.advice import ROWS, advice
from sd3tune.config.explaining import explain, page, search, settings
from sd3tune.config.reading import LEAVES, is_live, values_refused

ROOT = Path(__file__).parent.parent


def test_every_setting_is_explained() -> None:
    """All leaves in order, each with a meaning, something that it may be, and its default as it is."""
    found = settings()
    assert [one.name for one in found] == list(LEAVES)
    defaults = st.RunConfig().leaves()
    for one in found:
        assert one.meaning[0].isupper() or one.meaning.startswith('"'), one.name
        assert one.meaning.endswith((".", "True", "False", "1", "1.0", "4096")), one.name
        assert one.values, one.name
        assert one.default == defaults[one.name]
        assert one.live == is_live(one.name)


def test_ranges_are_those_that_are_enforced() -> None:
    """At both ends of what is said a value is allowed, and a step beyond it is refused; each choice is allowed, and no other word."""
    for one in settings():
        whole = one.kind.startswith("a whole number")
        for end, sign in ((one.low, -1), (one.high, 1)):
            if end is not None:
                at: Any = int(end) if whole else float(end)
                assert values_refused({one.name: at}) == {}, one.name
                assert values_refused({one.name: at + sign}), one.name
        if one.above is not None:
            assert values_refused({one.name: float(one.above)}), one.name
        for choice in one.choices:
            value: Any = {"true": True, "false": False}.get(choice, choice)
            assert values_refused({one.name: value}) == {}, one.name
        if one.choices and not one.kind:
            assert values_refused({one.name: "no such choice"}), one.name


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("lora_rank", "a whole number from 1 to 1,024", "16"),
        ("learning_rate", "a number above 0, at most 1", "0.0001"),
        ("mixed_precision", "bf16 | fp16 | no", "bf16"),
        ("use_t5", "true | false", "true"),
        ("lora_targets", "attention | attention+context | all-linear | a list", "attention"),
        ("gradient_checkpointing", "auto | true | false", "auto"),
        ("disk_low_threshold", "a number from 0 to 10,000 GB", "0.2"),
        ("webhook_config", "a text or a mapping or a list of mappings", ""),
        ("flow_custom_timesteps", "a list", ""),
        ("validation_negative_prompt", "a text", '""'),
        ("lr_end", "a number from 0 to 1", "4e-07"),
    ],
)
def test_values_in_words(name: str, values: str, shown: str) -> None:
    """Kind, range, unit and choices; a default as YAML has it."""
    assert (explain(name).values, explain(name).shown) == (values, shown)


def test_search_looks_everywhere_and_knows_no_case() -> None:
    """In names, sections, meanings and choices; several words all have to be there."""
    names = lambda *words: {one.name for one in search(words)}  # noqa: E731
    assert names("LR_Warmup") == {"lr_warmup_steps"}
    assert {"use_ema", "lora_rank"} <= names("ADAPTER.")
    assert "flow_sigmoid_scale" in names("logit-normal")
    assert names("sageattention") == {"attention_mechanism"}
    assert names("guidance", "skip", "strength") == {"validation_guidance_skip_scale"}
    assert names() == set(LEAVES)


def test_a_row_of_advice_is_about_what_it_reads() -> None:
    """Changing the settings that it names, from where it applies to where it does not, is what makes it come and go."""
    for (words, there, absent), row in zip(CASES, ROWS, strict=True):
        assert words in row.text
        assert all(name in LEAVES for name in row.settings)
        changed = {name for name in {*there, *absent} if there.get(name) != absent.get(name)}
        assert changed <= set(row.settings), row.text
        for name in row.settings:
            assert row.text in [one.text for one in explain(name).advice]
        assert row.text in [one.text for one in advice(st.RunConfig.make(**there))]


def test_in_a_pipe_each_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but text, so that grep works."""
    assert cli.main(["settings", "learning_rate"]) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("optimizer.learning_rate"))
    assert line.startswith("optimizer.learning_rate = 0.0001 [a number above 0, at most 1]: Peak learning rate;")
    assert "; may change while training" in line
    assert "advice: Lion wants about a tenth of AdamW's rate: 1e-5 rather than 1e-4 (Chen et al. 2023, section 5)" in line
    assert cli.main(["settings"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(LEAVES)
    assert "\x1b" not in out


@pytest.mark.parametrize("width", [60, 100])
def test_in_a_terminal_it_is_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int) -> None:
    """No line is longer than the terminal is wide, and no word is lost."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((width, 40)))
    assert cli.main(["settings", "guidance"]) == 0
    out = re.sub(r"\x1b\[\dm", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= width
    assert all(" ".join(one.meaning.split()) in " ".join(out.split()) for one in search(["guidance"]))
    assert cli.main(["settings", "--presets"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_a_word_that_no_setting_has(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest names, or where all are."""
    assert cli.main(["settings", "lerning_rat"]) == 1
    assert "no setting has 'lerning_rat' in its name or meaning; did you mean learning_rate" in capsys.readouterr().err
    assert cli.main(["settings", "qqqqqqqq"]) == 1
    assert "`sd3tune settings` lists all" in capsys.readouterr().err


def test_the_page_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``sd3tune settings --page`` writes what stands in docs; every setting has one row, every preset says what it is for."""
    text = page()
    assert (ROOT / explaining.PAGE).read_text(encoding="utf-8") == text, "run: sd3tune settings --page"
    assert cli.main(["settings", "--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text
    assert "written: " in capsys.readouterr().out
    rows = re.findall(r"^\| `(\w+)`( \*)? \|(.*)\|$", text, re.M)
    assert [name for name, _, _ in rows] == list(LEAVES)
    assert {name for name, live, _ in rows if live} == {name for name in LEAVES if is_live(name)}
    assert all(len(re.split(r"(?<!\\)\|", rest)) == 3 for _, _, rest in rows)
    for name in st.presets.names():
        assert f"| {name} | {st.presets.about(name)}" in text
        assert len(st.presets.about(name)) > 20
