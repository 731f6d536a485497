"""CLIP score: right captions above wrong ones, one number whatever the batch, pictures cut as transformers cuts them, clear refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sd3tune import playground
from sd3tune.data.images import read_rgb
from sd3tune.errors import ModelError
from sd3tune.models import clip, room
from sd3tune.models.clip import Preprocessing, Scorer, summary
from sd3tune.playground.recipe.scorer import PREPROCESSING, STYLES
from sd3tune.records import READING


def shown(part: str) -> tuple[list[Image.Image], list[str]]:
    """Pictures of the playground with their captions."""
    pictures, captions = [], []
    for path in sorted((playground.PICTURES / part).glob("*.png")):
        with path.open("rb") as opened:
            pictures.append(read_rgb(opened))
        captions.append(path.with_suffix(".txt").read_text().strip())
    return pictures, captions


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.load(playground.SCORER)


@pytest.mark.parametrize("part", ["heldout", "train"])
def test_right_captions_score_above_shuffled_ones(scorer: Scorer, part: str) -> None:
    """Measured: 0.370 against 0.100 over all wrong pairs (held out), 0.413 against 0.101 (training). An own caption is best of 24 in 9."""
    pictures, captions = shown(part)
    own = scorer.scores(pictures, captions)
    wrong = [scorer.scores(pictures, captions[k:] + captions[:k]) for k in (1, 5, 11)]
    margin = summary(own).mean - max(summary(row).mean for row in wrong)
    assert margin > 0.15, margin
    assert all(0 <= score <= 1 for row in (own, *wrong) for score in row)
    styled = scorer.scores(pictures, [f"{caption}, {STYLES[1]}" for caption in captions])
    assert summary(styled).mean > summary(own).mean + 0.08, "it knows the style too: 0.503 and 0.538"


def test_a_pictures_own_caption_is_often_the_best_of_24(scorer: Scorer) -> None:
    """9 of 24; by chance it would be 1."""
    pictures, captions = shown("heldout")
    best = 0
    for picture, caption in zip(pictures, captions, strict=True):
        found = scorer.scores([picture] * 24, captions, batch=24)
        best += captions[found.index(max(found))] == caption
    assert 6 <= best <= 14, best


def test_the_score_is_the_models_own_cosine(scorer: Scorer) -> None:
    """CLIPModel's logit over its scale; what is below 0 there is 0 here."""
    pictures, captions = shown("heldout")
    model, tokenizer = scorer._model, scorer._tokenizer
    inputs = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=scorer._preprocessing(pictures), **{k: inputs[k] for k in ("input_ids", "attention_mask")})
    cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    assert cosines.min() < -0.1, "else the next line would not see a missing clamp"
    assert scorer.scores(pictures, captions) == pytest.approx(cosines.clamp_min(0).tolist(), abs=1e-5)


def test_the_batch_does_not_matter(scorer: Scorer) -> None:
    """Of 1, 7 and 24, sizes mixed, up to the last bits."""
    pictures, captions = shown("heldout")
    assert len({picture.size for picture in pictures}) > 1
    rows = [scorer.scores(pictures, captions, batch=batch) for batch in (1, 7, 24)]
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], abs=2e-6)
    assert len(set(rows[0])) > 12
    with pytest.raises(ValueError, match="24 pictures and 23 prompts; each picture needs its own"):
        scorer.scores(pictures, captions[1:])


def test_long_prompts_are_cut_and_said(scorer: Scorer) -> None:
    """What is behind the sixteenth token counts for nothing, and the sentence quotes it."""
    pictures, captions = shown("heldout")
    long = "croissant on a plate and on a table and in a room and by a window with a rooster behind it"
    assert scorer.limit == 16
    assert scorer.scores(pictures[:1], [long]) == scorer.scores(pictures[:1], [long.replace("rooster", "camera")])
    said = scorer.truncated([*captions, long])
    assert len(said) == 1
    assert said[0].startswith(f'"{long}": the scorer 16 of ')
    assert 'without "' in said[0]
    assert said[0].endswith('rooster behind it"')


@pytest.mark.parametrize("size", [(64, 64), (224, 131), (131, 224), (65, 640), (97, 33), (40, 30)])
@pytest.mark.parametrize("source", ["playground", "none", "old", "nested"])
def test_pictures_are_prepared_as_transformers_does(tmp_path: Path, size: tuple[int, int], source: str) -> None:
    """With a file of settings, with none, with the old form of numbers for sides, and with transformers 5's own file."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    old = {"size": 64, "crop_size": 48, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    own: dict[str, Any] = {"playground": PREPROCESSING, "none": {"size": {"shortest_edge": 64}, "crop_size": 64}, "old": old, "nested": old}
    files = {"playground": ("preprocessor", PREPROCESSING), "old": ("preprocessor", old), "nested": ("processor", {"image_processor": old})}
    if source in files:
        name, content = files[source]
        (tmp_path / f"{name}_config.json").write_text(json.dumps(content))
    rng = torch.Generator().manual_seed(size[0])
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=rng, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    theirs = CLIPImageProcessorPil(**own[source])(picture, return_tensors="pt").pixel_values
    ours = Preprocessing.of_folder(tmp_path, 64)([picture])
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_the_playground_says_how_its_scorer_sees() -> None:
    """The file beside the weights is the recipe's, and it is read: -1 is black and 1 is white, as in training."""
    assert json.loads((playground.SCORER / "preprocessor_config.json").read_text()) == PREPROCESSING
    seen = Preprocessing.of_folder(playground.SCORER, 64)([Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")])
    assert seen[0].unique().tolist() == [-1.0]
    assert seen[1].unique().tolist() == [1.0]


def test_a_summary() -> None:
    """Least, most, mean, deviation of the population, and the standard error of the mean."""
    found = summary((0.2, 0.4, 0.3, 0.3))
    assert (found.count, found.min, found.max) == (4, 0.2, 0.4)
    assert found.mean == pytest.approx(0.3)
    assert found.std == pytest.approx(math.sqrt(0.02 / 4))
    assert found.error == pytest.approx(math.sqrt(0.02 / 3) / math.sqrt(4)), "deviation of the sample over the root of the count"
    assert str(found) == "0.300 ± 0.041 (4 pictures, 0.200 to 0.400)"
    one = summary([0.14])
    assert (one.std, one.error) == (0, math.inf)
    assert str(one) == "0.140 (1 picture)"
    assert all(figure in READING for figure in ("0.30 to 0.39", "0.18 to 0.22", "0.14"))


def test_it_goes_to_a_device_and_comes_back(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error; its memory is given back; without room nothing moves and the message says what is free."""
    given: list[int] = []
    monkeypatch.setattr(clip, "give_back", lambda: given.append(1))
    usage = namedtuple("usage", "free where")
    with monkeypatch.context() as patched:
        patched.setattr(room, "free_on", lambda device: usage(1000, "GPU memory"))
        with (
            pytest.raises(
                ModelError, match=r"the CLIP scorer needs 0\.0036 GB of GPU memory, 1e-06 GB free; set .* or evaluation_type: none"
            ),
            scorer.on("meta"),
        ):
            pass
    assert (scorer.device.type, given) == ("cpu", [])
    with pytest.raises(RuntimeError, match="meant"), scorer.on("cpu") as same:
        assert same is scorer
        raise RuntimeError("meant")
    assert (scorer.device.type, given) == ("cpu", [1])


def test_the_model_returns_to_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each move is made, in order, on a model that only notes them."""

    class Noting:
        logit_scale = torch.zeros(1)
        moves: list[str] = []  # noqa: RUF012 (one model, one test)

        def to(self, device: torch.device) -> None:
            self.moves.append(str(device))

        def parameters(self) -> list[torch.Tensor]:
            return []

    scorer = Scorer(Noting(), None, Preprocessing(64, 64))
    with scorer.on("meta"):
        assert Noting.moves == ["meta"]
    assert Noting.moves == ["meta", "cpu"]


def altered(folder: Path, **changes: Any) -> Path:
    """A copy of the playground's scorer with another configuration."""
    copy = Path(shutil.copytree(playground.SCORER, folder / "scorer"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_what_is_no_scorer_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, one of another kind, one that is torn: where, what, and what to set."""
    instead = (
        r"set pretrained_evaluation_model_name_or_path to a CLIP model of the hub, such as openai/clip-vit-base-patch32, or to its folder$"
    )
    with pytest.raises(ModelError, match=rf"/nowhere: no such folder; {instead}"):
        Scorer.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=rf"text_encoder: no CLIP model, but one of type clip_text_model; {instead}"):
        Scorer.load(playground.MODEL / "text_encoder")
    with pytest.raises(ModelError, match=rf"config\.json: cannot be read \(.*\); {instead}"):
        Scorer.load(playground.MODEL)
    copy = altered(tmp_path)
    (copy / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    with pytest.raises(
        ModelError, match=r"preprocessor_config\.json: says nothing clear about pictures .*; download or copy the model again"
    ):
        Scorer.load(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"scorer: cannot be loaded \(.*\); download or copy the model again"):
        Scorer.load(copy)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    copy = altered(tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"scorer: 1 tensors are missing or do not fit, visual_projection\.weight first; download"):
        Scorer.load(copy)


def test_weights_of_another_size_are_not_made_up_either(tmp_path: Path) -> None:
    """A configuration that is not that of the weights."""
    with pytest.raises(ModelError, match=r"scorer: 2 tensors are missing or do not fit, text_projection\.weight first; download"):
        Scorer.load(altered(tmp_path, projection_dim=48))


def test_weights_of_the_older_kind_are_read(tmp_path: Path, scorer: Scorer) -> None:
    """openai's own repositories hold pytorch_model.bin."""
    from safetensors.torch import load_file

    copy = altered(tmp_path)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    pictures, captions = shown("heldout")
    assert Scorer.load(copy).scores(pictures[:4], captions[:4]) == scorer.scores(pictures[:4], captions[:4])
