"""Questions about the pictures: where they are, what they are called, and how they are cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sd3tune import playground
from sd3tune.configuring import outcome
from sd3tune.configuring.checks import in_entry
from sd3tune.configuring.questions import Choice, Question
from sd3tune.data.catalog import from_datasets
from sd3tune.errors import Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.configuring.wizard import Wizard


def folder_question(wizard: Wizard) -> Question:
    """Where the pictures are."""
    return Question(
        "instance_data_dir", "Which folder holds the pictures to learn from?", "The other answers are suggested from it.", "folder",
        str(playground.PICTURES / "train"),
    )  # fmt: skip


def captions_question(wizard: Wizard) -> Question:
    """Where their captions come from."""
    found = wizard.found
    offered = [Choice("textfile", f"a .txt file beside each picture; {found.captioned} of {found.count} have one")]
    offered.append(
        Choice("filename", f"the file's name, such as {found.names[0]!r}" if found.names else "the file's name; here they say little")
    )
    offered.append(Choice("instanceprompt", "one text for all of them, which is asked next"))
    offered += [
        Choice(table.rpartition(".")[2], f"the table {table}") for table in {t.rpartition(".")[2]: t for t in found.tables}.values()
    ]

    def check(value: str) -> str:
        if value not in ("csv", "jsonl", "parquet"):
            return ""
        try:
            from_datasets([outcome.dataset_from({**wizard.answers, "caption_strategy": value}, found)])
        except Sd3TuneError as error:
            return str(error)
        return ""

    return Question("caption_strategy", "Where do the captions come from?", "The words of captions are what the adapter will answer to.",
                    "choice", found.caption_strategy, tuple(offered), check)  # fmt: skip


def trigger_question(wizard: Wizard) -> Question:
    """A text that goes with all of them."""
    why = "A rare word, such as sks, becomes the handle for what is new."
    if wizard.answers["caption_strategy"] == "instanceprompt":
        return Question("instance_prompt", "What do all the pictures show? Write it as a caption, with a trigger word.", why, "text",
                        "a photo in sks style", check=in_entry(wizard, "instance_prompt"))  # fmt: skip
    return Question("instance_prompt", "A trigger word to put before every caption? Nothing means none.", why, "text", "",
                    check=in_entry(wizard, "instance_prompt"))  # fmt: skip


def missing_question(wizard: Wizard) -> Question:
    """What becomes of pictures without a caption."""
    gone = wizard.found.count - wizard.found.captioned
    return Question("allow_missing_captions", f"{gone} pictures have no caption. Train them on the empty text?",
                    "Without a caption they move the model whatever is asked of it; otherwise `sd3tune plan` stops and names them.",
                    "yes/no", True)  # fmt: skip


def held_out_question(wizard: Wizard) -> Question:
    """How many are kept to judge by."""
    return Question("eval_share", "Which share of the pictures to hold out, from 0 to 0.9?",
                    "Only pictures that were never trained on can say when to stop.", "number", 0.1 if wizard.found.count >= 20 else 0,
                    check=in_entry(wizard, "eval_share"))  # fmt: skip


def resolution_question(wizard: Wizard) -> Question:
    """At which size they are learned."""
    small = wizard.answers["model"] == "playground"
    most = max(width for width, _ in wizard.config.validation_sizes)
    return Question("resolution", "At which size to train (px, the side of a square of the same area)?",
                    "Larger costs memory and time with its square; enlarging small pictures teaches blur.", "number",
                    64 if small else min(wizard.found.resolution, most), check=in_entry(wizard, "resolution"))  # fmt: skip


def crop_question(wizard: Wizard) -> Question:
    """How they are cut."""
    offered = (
        Choice("keep", "every picture keeps its shape, in buckets"), Choice("square", "the middle, as a square"),
        Choice("random", "four random squares of each, one each time"), Choice("face", "a square around the largest face"),
    )  # fmt: skip
    return Question("crop", "How to cut the pictures?", "What is cut away cannot be learned; one shape makes full batches.", "choice",
                    "keep", offered, in_entry(wizard, "crop"))  # fmt: skip


def repeats_question(wizard: Wizard) -> Question:
    """How often an epoch shows each."""
    data, count = wizard.config.data, outcome.learned_from(wizard.answers, wizard.found)
    fill = math.ceil(data.train_batch_size * data.gradient_accumulation_steps / count) - 1
    return Question("repeats", "How many extra times to show each picture in an epoch?",
                    "An epoch should hold at least one update's pictures.", "number", max(0, fill),
                    check=in_entry(wizard, "repeats"))  # fmt: skip
