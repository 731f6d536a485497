"""The wizard: what it asks follows from the answers, what it refuses has a reason, and what it writes loads and trains."""

from __future__ import annotations

import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench
from PIL import Image

import sd3tune as st
from sd3tune import cli, playground
from sd3tune.config.reading import LEAVES
from sd3tune.configuring import Machine, Wizard
from sd3tune.configuring.script import STEPS
from sd3tune.configuring.writing import yaml_line
from sd3tune.data.datasets import Dataset

CARD = Machine(gpu="a card", gpu_bytes=24e9, memory_bytes=64e9)
BARE = Machine(memory_bytes=16e9)


def pictures(folder: Path, count: int = 6, size: tuple[int, int] = (640, 640), captions: int = 0, names: str = "IMG_{}") -> Path:
    """A folder of plain pictures, the first ``captions`` of them with a caption."""
    folder.mkdir(parents=True)
    for i in range(count):
        path = folder / f"{names.format(i)}.png"
        Image.new("RGB", size, (i * 7 % 256, 40, 90)).save(path)
        if i < captions:
            path.with_suffix(".txt").write_text(f"a pot number {i}")
    return folder


def walked(machine: Machine, place: Path, **answers: Any) -> Wizard:
    """Every question answered: as named, or by its default."""
    wizard = Wizard(machine)
    while (question := wizard.question) is not None:
        given = str(place) if question.name == "instance_data_dir" else answers.pop(question.name, None)
        wizard = wizard.answer(given)
    assert not answers, f"never asked: {answers}"
    return wizard


def until(name: str, machine: Machine, place: Path, **answers: Any) -> Wizard:
    """The wizard when it asks for ``name``."""
    wizard = Wizard(machine)
    while wizard.question is not None and wizard.question.name != name:
        wizard = wizard.answer(str(place) if wizard.question.name == "instance_data_dir" else answers.get(wizard.question.name))
    assert wizard.question is not None, name
    return wizard


@pytest.fixture(scope="module")
def pots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures of 640 px."""
    return pictures(tmp_path_factory.mktemp("pots") / "my pots", 12, captions=12)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_every_question_says_what_and_why(pots: Path) -> None:
    """One sentence each; names are settings, keys of datasets.yaml, or the wizard's own five; choices have a meaning."""
    own = {"model", "gpu_gb", "preset", "length", "slg", "crop"}
    seen = []
    for machine, answers in ((CARD, {"model": "other"}), (BARE, {"push_to_hub": True, "length": "epochs", "lora_type": "lycoris"})):
        wizard = Wizard(machine)
        while (question := wizard.question) is not None:
            seen.append(question.name)
            assert question.name in LEAVES or question.name in Dataset.__dataclass_fields__ or question.name in own
            assert re.fullmatch(r"[A-Z].*\.", question.why), question.why
            assert question.asks[-1] in "?.)", question.asks
            assert all(choice.meaning for choice in question.choices) or question.name == "base_model_precision"
            assert bool(question.choices) == (question.kind == "choice")
            wizard = wizard.answer(str(pots) if question.name == "instance_data_dir" else answers.get(question.name))
    assert {*seen, "allow_missing_captions", "lora_rank", "lora_targets", "max_train_steps"} == {step.name for step in STEPS}


def test_questions_follow_from_the_answers(pots: Path) -> None:
    """Skip-layer guidance is asked for SD3.5 Medium alone, the card when there is none, the prompt's size when there is a prompt."""
    names = {
        model: set(walked(machine, pots, model=model).answers)
        for machine, model in ((CARD, "sd35-medium"), (BARE, "sd35-large"), (CARD, "sd3-medium"), (BARE, "playground"))
    }
    assert [model for model in names if "slg" in names[model]] == ["sd35-medium"]
    assert [model for model in names if "gpu_gb" in names[model]] == ["sd35-large"]
    assert "preset" not in names["playground"]
    assert "validation_resolution" not in walked(CARD, pots, validation_prompt=[]).answers
    assert "lora_rank" not in walked(CARD, pots, lora_type="lycoris").answers
    assert "max_train_steps" not in walked(CARD, pots, length="epochs").answers


def test_a_step_back_is_the_state_before(pots: Path) -> None:
    """All the way back to the beginning, at every question; the state itself is never changed."""
    wizard, states = Wizard(CARD), list[Wizard]()
    while (question := wizard.question) is not None:
        states.append(wizard)
        wizard = wizard.answer(str(pots) if question.name == "instance_data_dir" else None)
    for before in reversed(states):
        after, wizard = wizard, wizard.back()
        assert (wizard.answers, wizard.question, wizard.pictures) == (before.answers, before.question, before.pictures)
        assert len(after.answers) == len(before.answers) + 1
    assert wizard.back() == wizard


def test_what_lies_in_the_folder_is_suggested(tmp_path: Path, pots: Path) -> None:
    """Captions from text files, from names, or one text for all; a size that most have; what cannot be read is counted."""
    assert until("caption_strategy", CARD, pots).question.default == "textfile"  # type: ignore[union-attr]
    named = pictures(tmp_path / "named", names="a red pot_{}")
    assert until("caption_strategy", CARD, named).question.default == "filename"  # type: ignore[union-attr]
    plain = pictures(tmp_path / "plain", size=(900, 700))
    (plain / "broken.png").write_bytes(b"no picture")
    wizard = until("caption_strategy", CARD, plain)
    assert wizard.question is not None
    assert wizard.question.default == "instanceprompt"
    assert wizard.notes[0] == "6 pictures, from 900x700 to 900x700 px, 1 shapes"
    assert any("left out: broken.png: not a readable picture" in note for note in wizard.notes)
    assert until("resolution", CARD, plain).question.default == 768  # type: ignore[union-attr]
    assert until("resolution", CARD, pots).question.default == 512  # type: ignore[union-attr]
    half = pictures(tmp_path / "half", captions=2)
    made = walked(CARD, half, caption_strategy="textfile")
    assert made.config.data.allow_missing_captions
    assert "4 pictures have no caption and are trained on the empty text" in made.cautions
    made = walked(CARD, half, caption_strategy="textfile", instance_prompt="sks")
    assert "allow_missing_captions" not in made.answers
    assert (made.dataset.instance_prompt, made.dataset.prepend_instance_prompt) == ("sks", True)


def test_two_prompts_of_ones_own_and_another(pots: Path) -> None:
    """With the trigger word, as the captions are trained; a step outside says what was lost."""
    *own, other = walked(CARD, pots, instance_prompt="sks").answers["validation_prompt"]
    assert own == ["sks a pot number 0", "sks a pot number 1"]
    assert "pot" not in other
    only = walked(CARD, pots, caption_strategy="instanceprompt", instance_prompt="a sks pot").answers["validation_prompt"]
    assert only == ("a sks pot", other)


def test_presets_are_offered_by_what_fits(pots: Path) -> None:
    """Each with a verdict by the memory formula; the default is the one made for the card."""
    for gigabytes, model, best in (
        (24, "sd35-large", "sd35-large-24gb"),
        (12, "sd35-large", "sd35-large-12gb"),
        (16, "sd35-medium", "sd35-medium-16gb"),
    ):
        machine = Machine(gpu="a card", gpu_bytes=gigabytes * 1e9, memory_bytes=64e9)
        question = until("preset", machine, pots, model=model).question
        assert question is not None
        assert question.default == best
        said = {choice.value: choice.meaning for choice in question.choices}
        assert "fits: needs" in said[best]
        assert f"of the card's {gigabytes}.0 GB" in said[best]
    tiny = until("preset", Machine(gpu="a card", gpu_bytes=4e9, memory_bytes=64e9), pots, model="sd35-large").question
    assert tiny is not None
    assert all("no: needs" in choice.meaning for choice in tiny.choices if choice.value != "none")
    remote = until("preset", BARE, pots, model="sd35-large", gpu_gb=24).question
    assert remote is not None
    assert remote.default == "sd35-large-24gb"


def test_length_is_said_as_times_seen(pots: Path) -> None:
    """12 pictures, 2 extra times, batch 2 x 2: 9 updates an epoch; 90 updates are 10 epochs, in each of which a picture is seen thrice."""
    wide = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "repeats": 2}
    wizard = until("validation_prompt", CARD, pots, **wide, max_train_steps=90)
    assert wizard.sentence == "12 pictures to learn from: 9 updates an epoch; 90 updates show each picture about 30 times"
    assert wizard.sentence in wizard.notes
    assert walked(CARD, pots, **wide, length="epochs", num_train_epochs=10).sentence == wizard.sentence


# --- what is refused, and what is pointed out -------------------------------------------------------------------------

REFUSED = (
    ("lora_rank", "0", "lora_rank: 0 is not allowed: it should be greater than or equal to 1 (a whole number from 1 to 1,024)"),
    ("lora_rank", "many", "lora_rank: 'many' is not allowed: it should be a number"),
    ("lora_rank", 2.5, "lora_rank: 2.5 is not allowed"),
    ("learning_rate", "nan", "learning_rate"),
    ("learning_rate", "-1", "greater than 0 (a number above 0, at most 1)"),
    ("train_batch_size", True, "train_batch_size: True is not allowed: it should be a number"),
    ("max_train_steps", "0", "(a whole number from 1 to 10,000,000 updates)"),
    ("optimizer", "adam", "it should be one of adamw, "),
    ("optimizer", "99", "it should be one of adamw, "),
    ("resolution", "4", "resolution 4 is in px"),
    ("repeats", "-1", "repeats: greater than or equal to 0"),
    ("eval_share", "0.95", "eval_share: less than or equal to 0.9"),
    ("validation_resolution", "huge", "validation_resolution: "),
    ("instance_data_dir", "nowhere", "nowhere: no such folder"),
    ("instance_data_dir", "run.yaml", "is a file of data sets already"),
    ("push_to_hub", "perhaps", "it should be yes or no"),
    ("slg", 7, "it should be yes or no"),
    ("validation_prompt", {"a": 1}, "it should be a text"),
    ("output_dir", "a\x00b", "without control characters"),
)


@pytest.mark.parametrize(("name", "given", "text"), REFUSED, ids=[f"{row[0]}={row[1]}" for row in REFUSED])
def test_a_wrong_answer_is_refused_with_the_declaration(pots: Path, name: str, given: Any, text: str) -> None:
    """With the setting's own range and unit; the question stays, and nothing else changes."""
    wizard = until(name, CARD, pots)
    before = dict(wizard.answers)
    with pytest.raises(st.Sd3TuneError) as refused:
        wizard.answer(given)
    assert text in str(refused.value)
    assert wizard.answers == before


def test_what_contradicts_earlier_answers_is_refused(pots: Path) -> None:
    """The rules between settings are those of every configuration."""
    with pytest.raises(st.ConfigError, match="prodigy finds its own rate and multiplies it by learning_rate"):
        until("learning_rate", CARD, pots, optimizer="prodigy").answer("1e-4")
    assert walked(CARD, pots, optimizer="prodigy").config.optimizer.learning_rate == 1.0
    with pytest.raises(st.ConfigError, match="hub_model_id: 'a/b/c' is not owner/name or name"):
        until("hub_model_id", CARD, pots, push_to_hub=True).answer("a/b/c")


def test_dangers_are_pointed_out(pots: Path) -> None:
    """The guide's traps: too few pictures, a high rate for Large, formats that do not work, no prompt, no room, no card, no access."""
    weak = Machine(
        gpu="a card", gpu_bytes=6e9, memory_bytes=8e9, free_bytes=lambda path: 1e6, tried=lambda names: dict.fromkeys(names, "it cannot"),
        access=lambda config: ("its licence is not accepted yet",), trackers=lambda config: ("wandb is not installed",),
    )  # fmt: skip
    answers: dict[str, Any] = {
        "model": "sd35-large", "base_model_precision": "fp8-quanto", "learning_rate": 4e-5, "train_batch_size": 16, "repeats": 0,
        "validation_prompt": [], "resolution": 1024, "report_to": "wandb", "optimizer": "stableadamw",
    }  # fmt: skip
    said = "\n".join(walked(weak, pots, **answers).cautions)
    for text in (
        "12 pictures an epoch are fewer than the", "repeats: ", "4e-5 may blow up",
        "base_model_precision: fp8-quanto does not work on this machine (it cannot)",
        "no validation prompt", "memory: no: needs", "disk: cache and checkpoints take about", "its licence is not accepted yet",
        "wandb is not installed", "enlarged by more than a half",
    ):  # fmt: skip
        assert text in said, text
    well = walked(CARD, pots, model="sd35-medium", resolution=512, train_batch_size=2, gradient_accumulation_steps=1)
    assert well.cautions == ()
    assert "there is no GPU here" in "\n".join(walked(BARE, pots, model="sd35-medium").cautions)


def test_repeats_fill_one_update(pots: Path) -> None:
    """The suggestion is the least number with which an epoch holds the pictures of one update."""
    for batch, wanted in ((1, 0), (12, 0), (13, 1), (36, 2), (37, 3)):
        question = until("repeats", CARD, pots, train_batch_size=batch, gradient_accumulation_steps=1).question
        assert question is not None
        assert question.default == wanted


def test_advice_comes_with_the_answer_that_calls_for_it(pots: Path) -> None:
    """After the rate of Large, and not after the next answer."""
    wizard = until("learning_rate", CARD, pots, model="sd35-large", optimizer="stableadamw").answer("1e-4")
    assert any("4e-5 may blow up" in note for note in wizard.notes)
    assert not any("4e-5 may blow up" in note for note in wizard.answer(None).notes)


# --- what is written -------------------------------------------------------------------------------------------------

KINDS: tuple[tuple[Machine, dict[str, Any]], ...] = (
    (CARD, {}),
    (CARD, {"model": "sd35-medium", "slg": False, "length": "epochs", "crop": "random"}),
    (CARD, {"model": "sd35-large", "preset": "stable", "optimizer": "prodigy", "validation_prompt": ["a: b # c", "- x", "'\" {y}, [z]"]}),
    (CARD, {"model": "sd35-large", "preset": "low-vram", "optimizer": "adamw", "push_to_hub": True, "hub_model_id": "me/pots"}),
    (CARD, {"model": "sd35-medium", "preset": "sd35-medium-seed", "max_train_steps": 7, "instance_prompt": "no"}),
    (CARD, {"model": "sd35-medium", "preset": "sd35-medium-slg", "slg": False}),
    (CARD, {"model": "other", "pretrained_model_name_or_path": "me/my-sd3", "preset": "none", "lora_type": "lycoris"}),
    (CARD, {"model": "sd3-medium", "preset": "none", "optimizer": "schedulefree", "eval_share": 0.25}),
    (BARE, {"model": "playground", "crop": "square", "resolution": 64, "caption_strategy": "filename", "instance_prompt": "1e-4"}),
    (BARE, {"model": "playground", "validation_prompt": [], "lora_type": "lycoris", "output_dir": "~/a run: 2"}),
)


@pytest.mark.parametrize(("machine", "answers"), KINDS, ids=range(len(KINDS)))
def test_files_load_as_what_was_answered(tmp_path: Path, pots: Path, machine: Machine, answers: dict[str, Any]) -> None:
    """run.yaml is the wizard's configuration and holds no more than what differs; datasets.yaml is its entry; plan() takes both."""
    wizard = walked(machine, pots, **answers)
    files = wizard.files(tmp_path)
    files.write()
    config = st.RunConfig.load(files.run)
    assert config == wizard.config
    (entry,) = st.discover(files.datasets).datasets
    assert entry == wizard.dataset
    assert len(st.plan(st.discover(files.datasets), config).train) >= 9
    preset = wizard.answers.get("preset", "none")
    text = files.run.read_text()
    assert (f"extends: preset:{preset}" in text) == (preset != "none")
    base = st.RunConfig().leaves() if preset == "none" else st.presets.load(preset).leaves()
    named = re.findall(r"^(\w+):", text, re.M)
    assert all(config.leaves()[name] != base[name] for name in named if name != "extends")
    compile(files.cell, "cell", "exec")
    v = config.validation
    assert v.validation_guidance == (4.0 if v.validation_guidance_skip_layers else 3.0)


@pytest.mark.parametrize(
    "value",
    ["no", "1e-4", "", "~", "a: b", "# x", "[1]", "{a}", "'", '"', "é€😀", "a, b", "- x", "null", "\\", 0.1, 3, True, None, ("a", "b, c")],
)
def test_yaml_lines_read_back(value: Any) -> None:
    """Whatever a text looks like, it is the same text; a comment may follow."""
    from ruamel.yaml import YAML

    found = YAML(typ="safe", pure=True).load(f"{yaml_line('name', value)}  # a comment")
    assert found == {"name": list(value) if isinstance(value, tuple) else value}
    assert type(found["name"]) is (list if isinstance(value, tuple) else type(value))


def test_nothing_is_overwritten(tmp_path: Path, pots: Path) -> None:
    """With either name taken both get the next number, what is there stays, and a file that comes meanwhile is refused."""
    (tmp_path / "datasets.yaml").write_text("mine")
    wizard = walked(BARE, pots, model="playground")
    files = wizard.files(tmp_path)
    assert (files.run.name, files.datasets.name, [p.name for p in files.taken]) == ("run-2.yaml", "datasets-2.yaml", ["datasets.yaml"])
    assert "run-2.yaml --data" in files.commands[1]
    files.run.write_text("meanwhile")
    with pytest.raises(st.FileError, match=r"run-2.yaml: is already there; nothing was written"):
        files.write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["datasets.yaml", "run-2.yaml"]
    assert wizard.files(tmp_path).run.name == "run-3.yaml"
    with pytest.raises(st.ConfigError, match="model is not answered yet"):
        until("model", BARE, pots).files(tmp_path)


# --- the real command ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_answers_train(bench: Workbench, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of answers to a trained adapter, by the commands that are printed."""
    shutil.copytree(bench.datasets.parent / "train", home / "my pictures")
    (home / "answers.yaml").write_text(
        "instance_data_dir: my pictures\nmodel: playground\nresolution: 64\nmax_train_steps: 3\nvalidation_prompt: lock\neval_share: 0.2\n"
        "output_dir: runs/mine\n"
    )
    assert cli.main(["configure", "--answers", "answers.yaml", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "written: run.yaml and datasets.yaml" in out
    assert "instance_data_dir: my pictures  #" in (home / "datasets.yaml").read_text()
    plan, train = re.findall(r"^  (sd3tune .+)$", out, re.M)
    assert cli.main(shlex.split(plan)[1:]) == 0
    assert "10 images, batch 4" in capsys.readouterr().out
    assert cli.main([*shlex.split(train)[1:], "--set", "validation_num_inference_steps=1", "--set", "eval_timesteps=1"]) == 0
    run = st.open_run(home / "runs" / "mine")
    assert (run.status, run.step) == ("finished", 3)
    assert cli.main(["configure", "--answers", "answers.yaml", "--yes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "run.yaml, datasets.yaml: already there, and left alone; the new files are run-2.yaml and datasets-2.yaml" in out


def test_yes_takes_every_default(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is the playground's own pictures, and it plans."""
    assert cli.main(["configure", "new folder", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "sd3tune plan 'new folder/run.yaml' --data 'new folder/datasets.yaml'" in out
    assert cli.main(["plan", "new folder/run.yaml", "--data", "new folder/datasets.yaml"]) == 0
    assert st.RunConfig.load("new folder/run.yaml").model.model_flavour == "playground"


def test_without_a_terminal_it_says_how(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 without answers; 1 with too few, with an unknown one, or with one that is not asked. Nothing is written."""
    assert cli.main(["configure"]) == 2
    assert "give --answers FILE, --set NAME=VALUE, or --yes" in capsys.readouterr().err
    for words, text in (
        (["--set", "lora_rank=4"], "instance_data_dir has no answer"),
        (["--set", "lora_rnk=4", "--yes"], "no question is called 'lora_rnk'; did you mean 'lora_rank'?"),
        (["--set", "slg=true", "--yes"], "slg has an answer, and with the other answers it is not asked"),
        (["--set", "lora_rank=0", "--yes"], "lora_rank: 0 is not allowed"),
        (["--answers", "nowhere.yaml"], "there is no such file"),
    ):
        assert cli.main(["configure", *words]) == 1
        assert text in capsys.readouterr().err
    assert list(home.iterdir()) == []


class Terminal:
    """A person at a terminal who types these lines."""

    def __init__(self, patched: pytest.MonkeyPatch, lines: Iterator[str | type[BaseException]]) -> None:
        self.shown: list[str] = []
        patched.setattr("sys.stdin.isatty", lambda: True, raising=False)
        patched.setattr("builtins.input", self.typed)
        self._lines = lines

    def typed(self, prompt: str = "") -> str:
        self.shown.append(prompt)
        line = next(self._lines, "")
        if isinstance(line, str):
            return line
        raise line


def test_a_person_asks_why_goes_back_and_corrects(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`?` explains with the declaration, `<` goes back, a wrong answer is asked again, Enter takes the default."""
    lines = ["", "<", "?", "", "filename", "<", "", "", "0.95", "0", "playground", "", "", "?", "lots", "8"]
    terminal = Terminal(monkeypatch, iter(lines))
    assert cli.main(["configure", "--set", "max_train_steps=5"]) == 0
    out = capsys.readouterr().out
    assert "The other answers are suggested from it." in out
    assert "eval_share: less than or equal to 0.9" in out
    assert "Rank of the two factors of each weight change." in out
    assert "'lots' is not allowed: it should be a number" in out
    assert "note: 72 pictures" in out
    made = st.RunConfig.load("run.yaml")
    assert (made.adapter.lora_rank, made.schedule.max_train_steps) == (8, 5)
    assert st.discover("datasets.yaml").datasets[0].caption_strategy == "textfile"
    asked = [prompt.strip().splitlines()[0] for prompt in terminal.shown]
    assert asked.count("Which rank?") == 3
    assert "How many updates?" not in asked
    assert asked[-1] == "Write them? [yes]"


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, EOFError])
@pytest.mark.parametrize("after", [0, 4, 200])
def test_leaving_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leaving: type[BaseException], after: int
) -> None:
    """At the first question, in the middle, and at the last word."""

    def lines() -> Iterator[str | type[BaseException]]:
        yield from [""] * (after if after < 100 else len(playground_questions()))
        yield leaving

    Terminal(monkeypatch, lines())
    assert cli.main(["configure"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def playground_questions() -> list[str]:
    """What is asked when every default is taken."""
    return list(walked(BARE, playground.PICTURES / "train").answers)


NASTY: tuple[Callable[[random.Random], str], ...] = (
    lambda r: r.choice(["null", "~", "''", "[]", "{}", "yes", "no", "true", "-1", "0", "1", "2", "1e400", ".nan", ".inf", "0x1F", "1_000"]),
    lambda r: r.choice(
        ["[1, [2, {a: b}]]", "{a: {b: c}}", "2001-01-01", "2001-01-01 10:00:00", "!!binary aGk=", "!!set {a, b}", "'|'", "a | b"]
    ),
    lambda r: str(r.randint(-(10**12), 10**12)),
    lambda r: repr(r.uniform(-10, 10)),
    lambda r: "'" + "".join(chr(r.choice([0x20, 0x41, 0xE9, 0x85, 0x2028, 0xFEFF, 0x1F600, 0x09])) for _ in range(r.randint(1, 9))) + "'",
    lambda r: "9" * r.choice([20, 400, 5000]),
)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 60))])
def test_no_file_of_answers_is_an_accident(
    bench: Workbench, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """Whatever stands in it: two files that load, or one message and nothing written; never a traceback."""
    monkeypatch.setattr("sd3tune.models.capabilities.probe", lambda names: dict.fromkeys(names, ""))
    chance = random.Random(seed)
    names = [step.name for step in STEPS if step.name not in ("instance_data_dir", "model", "gpu_gb")]
    for turn in range(8):
        chosen = chance.sample(names, chance.randint(1, 3))
        rows = [f"{name}: {chance.choice(NASTY)(chance)}" for name in chosen]
        where = chance.choice([str(bench.datasets.parent / "train")] * 9 + ["[a]", "'\\x00'", "pictures", "''"])
        (home / "answers.yaml").write_text(
            "\n".join([f"instance_data_dir: {where}", "model: playground", *rows]) + chance.choice(["\n"] * 9 + ["\n]: {"])
        )
        code = cli.main(["configure", f"made-{turn}", "--answers", "answers.yaml", "--yes"])
        error = capsys.readouterr().err
        assert code in (0, 1), rows
        assert "Traceback" not in error
        assert (home / f"made-{turn}").exists() == (code == 0)
        if code == 0:
            st.RunConfig.load(home / f"made-{turn}" / "run.yaml")
            st.discover(home / f"made-{turn}" / "datasets.yaml")
        else:
            assert re.match(r"\w+Error: ", error), error
