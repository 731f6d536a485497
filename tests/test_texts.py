"""Texts as the transformer is given them: which encoder reads what, what stands for no text, lengths and pads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Workbench
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from test_batches import make_plan
from torch import Tensor
from transformers import T5TokenizerFast

import sd3tune as st
from sd3tune import playground
from sd3tune.cache import Cache
from sd3tune.cache.conditioning import Conditioning
from sd3tune.cache.states import joined
from sd3tune.data import Dataset
from sd3tune.data.simpletuner import settings_of
from sd3tune.training.batches import Batches, generator, load
from sd3tune.validation.class_pictures import draw
from sd3tune.validation.evaluate import evaluation_loss

L, G, P = slice(0, 64), slice(64, 160), slice(160, 192)
"""Columns of CLIP-L, of CLIP-G and of what is beyond them, in the playground."""

CLIP = 16
"""Tokens of the playground's CLIP encoders."""

DROPS = list(itertools.product((False, True), repeat=3))
POLICIES = list(itertools.product(("empty_string", "zero"), repeat=2))


def parts(joint_LD: Tensor, pooled_P: Tensor) -> dict[str, Tensor]:
    """What each encoder gave, cut out of what the transformer is given."""
    return {
        "l": joint_LD[:CLIP, L], "g": joint_LD[:CLIP, G], "t5": joint_LD[CLIP:], "pooled l": pooled_P[L], "pooled g": pooled_P[G],
        "beyond": joint_LD[:CLIP, P],
    }  # fmt: skip


def expected(cache: Cache, caption: str, dropped: tuple[bool, ...], clip: str, t5: str) -> dict[str, Tensor]:
    """The same from the stored states of the caption and of the empty text, encoder by encoder."""
    full, empty = (parts(*(rows[0] for rows in joined([cache.states(text)]))) for text in (caption, ""))
    found = {"beyond": torch.zeros(CLIP, 32)}
    names, policies = ("l", "g", "t5", "pooled l", "pooled g"), (clip, clip, t5, clip, clip)
    for name, drop, what in zip(names, (*dropped, *dropped[:2]), policies, strict=True):
        found[name] = full[name] if not drop else torch.zeros_like(full[name]) if what == "zero" else empty[name]
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert {name: bool(torch.equal(found[name], value)) for name, value in wanted.items()} == dict.fromkeys(wanted, True)


# --- one text, some encoders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock() -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(playground.MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dropped", DROPS, ids=str)
def test_texts_by_encoder_are_diffusers_three_prompts(bench: Workbench, stock: Any, dropped: tuple[bool, ...]) -> None:
    """What an encoder does not read is the empty text for it alone, as prompt, prompt_2 and prompt_3 of the stock pipeline are."""
    cache = bench.cache(bench.config())
    words = tuple("" if drop else "lock" for drop in dropped)
    wanted, _, pooled, _ = stock.encode_prompt(*[[w] for w in words], max_sequence_length=16, do_classifier_free_guidance=False)
    found = cache.text(cast(Any, words))
    assert torch.allclose(found.joint_LD, wanted[0], atol=1e-5)
    assert torch.allclose(found.pooled_P, pooled[0], atol=1e-5)


@pytest.mark.parametrize(("clip", "t5"), POLICIES)
def test_what_stands_for_no_text(bench: Workbench, clip: str, t5: str) -> None:
    """By encoder: its part of the caption, of the empty text, or zeros; to the last bit, in its own columns and rows alone."""
    config = bench.config(sd3_clip_uncond_behaviour=clip, sd3_t5_uncond_behaviour=t5)
    cache = bench.cache(config)
    before = [tensor.clone() for text in ("", "lock") for tensor in cache.states(text)]
    for dropped in DROPS:
        words: Any = tuple("" if drop else "lock" for drop in dropped)
        for given in {words, words[0]} if len(set(words)) == 1 else {words}:
            same(parts(*cache.text(given)), expected(cache, "lock", dropped, clip, t5))
    joint_BLD, pooled_BP = cache.texts(["lock", "", ("", "lock", "lock")])
    for place, dropped in enumerate(((False,) * 3, (True,) * 3, (True, False, False))):
        same(parts(joint_BLD[place], pooled_BP[place]), expected(cache, "lock", dropped, clip, t5))
    after = [tensor for text in ("", "lock") for tensor in cache.states(text)]
    assert all(map(torch.equal, before, after)), "the entries themselves stay what the encoders gave"
    assert len({bool(tensor.any()) for tensor in after}) == 1


def test_blanks_are_no_text() -> None:
    """A text of blanks counts as the empty one."""
    from sd3tune.cache.states import TextStates

    ones = TextStates(torch.ones(2, 3), torch.ones(4, 5), torch.ones(3))
    zero = Conditioning((1, 1), clip="zero", t5="zero")
    assert not any(tensor.any() for tensor in zero.states("  ", lambda _: ones))
    assert all(tensor.all() for tensor in zero.states(" a ", lambda _: ones))


# --- dropping captions -----------------------------------------------------------------------------------------------


def batches_of(seed: int, p: float, mode: Any = "per_encoder", *, batch: int = 4, **keys: Any) -> Batches:
    plan = make_plan(16, batch=batch, shapes=1)
    dataset = Dataset(id="d", instance_data_dir="d", **keys)
    plan = replace(plan, train=tuple(replace(row, item=replace(row.item, dataset=dataset)) for row in plan.train))
    return Batches(cast(Cache, SimpleNamespace(plan=plan)), seed=seed, caption_dropout=p, dropout_mode=mode)


def drops(batches: Batches, count: int = 1500) -> Tensor:
    """Batch, place, encoder."""
    return torch.tensor([batches.dropped_by_encoder(k) for k in range(count)]).float()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_encoder_is_dropped_by_itself(p: float) -> None:
    """Each at the cube root (0.464 for 0.1), two at its square, all three at the probability; whatever the place, and independently."""
    found = drops(batches_of(3, p))
    each, images = p ** (1 / 3), found[..., 0].numel()

    def about(rate: float, count: int = images) -> Any:
        return pytest.approx(rate, abs=4.5 * (rate * (1 - rate) / count) ** 0.5)

    assert found.mean((0, 1)).tolist() == [about(each)] * 3
    assert found.prod(2).mean() == about(p)
    assert [float(found[..., list(two)].prod(2).mean()) for two in ((0, 1), (0, 2), (1, 2))] == [about(each**2)] * 3
    assert found.mean(0).flatten().tolist() == [about(each, 1500)] * 12
    correlation = torch.corrcoef(found.reshape(1500, 12).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / 1500**0.5, "between encoders and between places of a batch"
    later = torch.corrcoef(torch.stack([found[:-1].flatten(), found[1:].flatten()]))[0, 1]
    assert abs(later) < 5 / found.numel() ** 0.5, "from batch to batch"
    if p == 0.1:
        assert each == pytest.approx(0.464, abs=0.0005)


def test_dropping_by_encoder_is_a_function_of_seed_batch_and_place() -> None:
    """Asked in any order, in a smaller batch, or at a higher rate, the same are dropped; other seeds drop others."""
    whole, small, more, other = batches_of(5, 0.2), batches_of(5, 0.2, batch=3), batches_of(5, 0.4), batches_of(6, 0.2)
    forth = [whole.dropped_by_encoder(k) for k in range(40)]
    assert [batches_of(5, 0.2).dropped_by_encoder(k) for k in reversed(range(40))] == forth[::-1]
    wide = [k for k in range(40) if len(small.placements(k)) == 3]
    assert [small.dropped_by_encoder(k) for k in wide] == [forth[k][:3] for k in wide]
    assert (drops(more, 40) >= drops(whole, 40)).all()
    assert (drops(more, 40) > drops(whole, 40)).any()
    assert not torch.equal(drops(other, 40), drops(whole, 40))


@pytest.mark.parametrize("mode", ["joint", "per_encoder"])
def test_a_rate_of_its_own(mode: str) -> None:
    """``caption_dropout`` of a data set goes before the run's; 0 and 1 are exact; a rate says the share of each encoder, too."""
    assert not drops(batches_of(1, 0.0, mode), 300).any()
    assert drops(batches_of(1, 1.0, mode), 300).all()
    assert not drops(batches_of(1, 0.9, mode, caption_dropout=0.0), 300).any()
    own = batches_of(1, 0.9, mode, caption_dropout=0.1)
    assert own.dropout_rates(own.placements(0)[0].item.dataset) == (0.1, 0.1 if mode == "joint" else 0.1 ** (1 / 3))
    assert drops(own).prod(2).mean() == pytest.approx(0.1, abs=0.02)


def test_joint_dropout_is_what_it_was() -> None:
    """All encoders together, by the first draws of (seed, k, 1); a change here changes every run that is resumed."""
    batches = Batches(cast(Cache, SimpleNamespace(plan=make_plan(16, batch=4, shapes=1))), seed=7, caption_dropout=0.3)
    bits = "".join(str(int(drop)) for k in range(40) for drop in batches.dropped(k))
    assert hex(int(bits, 2)) == "0x30090005201010a200250248240c81413f79a"
    for k in range(40):
        draws = torch.rand(4, generator=generator(7, k, 1)).tolist()
        assert batches.dropped_by_encoder(k) == tuple((draw < 0.3,) * 3 for draw in draws)
        assert all(isinstance(caption, str) for caption in batches.captions(k))
    assert drops(batches).mean((0, 1)).tolist() == pytest.approx([0.3] * 3, abs=0.03)


def test_what_is_dropped_is_what_is_read() -> None:
    """The caption that was drawn, for each encoder that is not without it; the choice of captions does not depend on dropping."""
    never, some = batches_of(2, 0.0), batches_of(2, 0.3)
    kinds = set()
    for k in range(60):
        for caption, words, dropped in zip(never.captions(k), some.captions(k), some.dropped_by_encoder(k), strict=True):
            by_encoder = (words,) * 3 if isinstance(words, str) else words
            assert by_encoder == tuple("" if drop else caption for drop in dropped)
            assert isinstance(words, str) == (len(set(dropped)) == 1)
            kinds.add(dropped)
        assert some.dropped(k) == tuple(words == "" for words in some.captions(k))
    assert len(kinds) == 8


# --- what the transformer is given -----------------------------------------------------------------------------------


@contextmanager
def given_to(transformer: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Joint states B L D and pooled B P of every call in the block."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, __: Any, named: dict[str, Any]) -> None:
        seen.append((named["encoder_hidden_states"].detach().clone(), named["pooled_projections"].detach().clone()))

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def pads_of(text: str, joint_LD: Tensor) -> Tensor:
    """T5's rows after those of a text and of its end."""
    used = len(T5TokenizerFast.from_pretrained(playground.MODEL / "tokenizer_3")(text).input_ids)
    assert CLIP + used < len(joint_LD)
    assert joint_LD[CLIP : CLIP + used].any(1).all(), "the text's own rows are never zero"
    return joint_LD[CLIP + used :]


LENGTHS = [
    (77, "unmodified", "empty_string", "zero"), pytest.param(154, "zero", "zero", "empty_string", marks=pytest.mark.full),
    pytest.param(256, "zero", "empty_string", "empty_string", marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(("length", "padding", "clip", "t5"), LENGTHS)
def test_training_evaluation_and_validation_give_the_same(bench: Workbench, length: int, padding: str, clip: str, t5: str) -> None:
    """One length, one way of padding and one unconditional in all three; only training drops captions."""
    trainer = bench.trainer(
        tokenizer_max_length=length, t5_padding=padding, sd3_clip_uncond_behaviour=clip, sd3_t5_uncond_behaviour=t5,
        caption_dropout_mode="per_encoder", caption_dropout_probability=0.3, validation_num_inference_steps=1, validation_prompt=("lock",),
        train_batch_size=2, eval_timesteps=1, num_eval_images=2, lora_rank=2,
    )  # fmt: skip
    trainer.engine.guard.began = None
    cache, batches = trainer.cache, trainer.engine.batches
    with given_to(trainer.transformer) as training:
        trainer.step()
    with given_to(trainer.transformer) as evaluation:
        trainer.evaluate()
    with given_to(trainer.transformer) as validation:
        list(trainer.validation())
    assert {joint.shape[1] for joint, _ in (*training, *evaluation, *validation)} == {CLIP + length}

    seen = [state for joint, pooled in training[-9:] for state in zip(joint, pooled, strict=True)]
    rows = [row for k in (*range(8), 0) for row in zip(batches.placements(k), batches.dropped_by_encoder(k), strict=True)]
    assert len({dropped for _, dropped in rows}) > 4, "of the look at eight batches before the first update, and of that update"
    for (joint, pooled), (placement, dropped) in zip(seen, rows, strict=True):
        same(parts(joint, pooled), expected(cache, placement.item.caption, dropped, clip, t5))
    held = [p.item.caption for p in cache.plan.evaluation]
    calls, done = iter(evaluation), 0
    while done < len(held):
        model, base = next(calls), next(calls)  # then come training pictures
        for joints, pooleds in (model, base):
            for joint, pooled, caption in zip(joints, pooleds, held[done : done + len(joints)], strict=True):
                same(parts(joint, pooled), expected(cache, caption, (False,) * 3, clip, t5))
                assert bool(pads_of(caption, joint).any()) == (padding == "unmodified")
        done += len(model[0])
    (joint, pooled) = validation[0]
    same(parts(joint[0], pooled[0]), expected(cache, "", (True,) * 3, clip, t5))
    same(parts(joint[1], pooled[1]), expected(cache, "lock", (False,) * 3, clip, t5))
    assert bool(pads_of("lock", joint[1]).any()) == (padding == "unmodified")


def test_a_held_out_picture_without_a_caption(bench: Workbench) -> None:
    """The evaluation gives it what stands for no text; so does a training batch of a picture that never had one."""
    cache = bench.cache(bench.config(sd3_clip_uncond_behaviour="zero", sd3_t5_uncond_behaviour="zero"))
    held = tuple(replace(p, item=replace(p.item, captions=())) for p in cache.plan.evaluation[:2])
    cache.plan = replace(cache.plan, evaluation=held, train=tuple(replace(p, item=replace(p.item, captions=())) for p in cache.plan.train))
    seen: list[Tensor] = []

    def velocity(noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        seen.extend((joint_BLD, pooled_BP))
        return noisy_BCHW

    evaluation_loss(velocity, cache, sigmas=(0.5,), device=torch.device("cpu"), step=0)
    batch = Batches(cache, seed=1, caption_dropout=0.0, dropout_mode="per_encoder")[0]
    again = load(cache, [(held[0], "")])
    assert len(seen) == 2
    assert not any(t.any() for t in (*seen, batch.joint_BLD, batch.pooled_BP, again.joint_BLD, again.pooled_BP))


def test_pads_are_those_of_the_tokenizer(bench: Workbench) -> None:
    """A pad that somebody writes into a text is part of the text; what follows the text is zero, and not minus zero."""
    config = bench.config(t5_padding="zero")
    with st.encoders(config).load() as loaded:
        (states,) = loaded.encode_texts(["a <pad> pot"])
    used = int(T5TokenizerFast.from_pretrained(playground.MODEL / "tokenizer_3")("a <pad> pot", return_tensors="pt").attention_mask.sum())
    assert states.t5_LD[:used].any(1).all()
    assert not states.t5_LD[used:].any()
    assert not torch.signbit(states.t5_LD[used:]).any()


@pytest.mark.parametrize(("clip", "t5"), [("zero", "zero"), pytest.param("zero", "empty_string", marks=pytest.mark.full)])
def test_pictures_with_zeros_are_stock_pictures(bench: Workbench, stock: Any, tmp_path: Path, clip: str, t5: str) -> None:
    """The trainer's and the class pictures are those of stock diffusers with the same zeros in negative_prompt_embeds, pixel by pixel."""
    layers = (7,) if t5 == "zero" else None
    run = bench.trainer(
        model_flavour="playground", sd3_clip_uncond_behaviour=clip, sd3_t5_uncond_behaviour=t5, validation_prompt=("lock",),
        validation_num_inference_steps=4,
        validation_guidance=4.0, validation_seed=3, validation_guidance_skip_layers=layers, validation_guidance_skip_layers_stop=0.9,
    )  # fmt: skip
    list(run.validation())
    (drawn, _), *_ = draw(run.config, ["lock"], tmp_path / "class", 1)
    (positive, pooled), (negative, negative_pooled) = (joined([run.cache.states(text)]) for text in ("lock", ""))
    if clip == "zero":
        negative[:, :CLIP], negative_pooled[:] = 0, 0
    if t5 == "zero":
        negative[:, CLIP:] = 0
    wanted = stock(
        prompt_embeds=positive, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
        generator=torch.Generator().manual_seed(3), num_inference_steps=4, guidance_scale=4.0, width=64, height=64,
        skip_guidance_layers=list(layers) if layers else None, skip_layer_guidance_stop=0.9,
    ).images[0]  # fmt: skip
    with Image.open(run.folder.images(0) / "00.png") as found:
        assert found.tobytes() == wanted.tobytes()
    with Image.open(drawn) as found:  # encoded apart, so that rounding may differ
        assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= 1


# --- settings, manifest, files ---------------------------------------------------------------------------------------


def test_a_run_refuses_a_cache_with_other_texts(bench: Workbench) -> None:
    """The settings that differ are named, before the model is loaded."""
    cache = bench.cache(bench.config())
    changes = {
        "tokenizer_max_length": 12, "t5_padding": "zero", "sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "zero",
        "use_t5": False,
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(st.ConfigError, match=f"{name}: the cache was made with another setting; build it from this configuration"):
            st.Trainer(bench.config(**{name: value}), cache)


def test_manifest_and_file_say_how_texts_were_read(bench: Workbench, tmp_path: Path) -> None:
    """How often captions are dropped, in both ways; length, pads and what stands for no text."""
    run = bench.trainer(caption_dropout_mode="per_encoder", sd3_t5_uncond_behaviour="zero", t5_padding="zero")
    assert "10.0% of the times seen without their caption (per_encoder, each encoder 46.4%)" in str(run.manifest)
    assert "pads zero; for no text CLIP gives that of the empty text, T5 zeros" in str(run.manifest)
    assert run.manifest.as_dict()["dropout"] == (("some", 12, 0.1, 0.1 ** (1 / 3)),)
    joint = replace(run.manifest, dropout=(("some", 12, 0.1, 0.1),), texts=str(Conditioning((1, 1), 77, clip="zero")))
    assert "dropout   some: 12 pictures, 10.0% of the times seen without their caption (joint)" in str(joint)
    assert "texts     T5 of 77 tokens, pads as T5 makes them; for no text CLIP gives zeros, T5 that of the empty text" in str(joint)
    run.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        said = {key.removeprefix("sd3tune."): value for key, value in opened.metadata().items()}
    assert (said["tokenizer_max_length"], said["t5_padding"], said["use_t5"]) == ("16", "zero", "True")
    assert (said["sd3_clip_uncond_behaviour"], said["sd3_t5_uncond_behaviour"]) == ("empty_string", "zero")


@pytest.mark.parametrize(
    ("given", "clip", "t5", "lines"),
    [
        ({"sd3_clip_uncond_behaviour": "zero"}, "zero", "zero", ["it is not set, which means what CLIP's says: zero"]),
        ({"sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "empty_string"}, "zero", "empty_string", []),
        ({"sd3_t5_uncond_behaviour": "zero"}, "empty_string", "zero", ["the empty text was encoded whatever it said; here it works"]),
        ({"sd3_t5_uncond_behaviour": "none"}, "empty_string", "empty_string", ["none means what CLIP's says, which is the default"]),
        ({"sd3_t5_uncond_behaviour": None}, "empty_string", "empty_string", ["none means what CLIP's says, which is the default"]),
        ({"sd3_clip_uncond_behaviour": "half"}, "empty_string", "empty_string", ["'half' is not there in this version"]),
    ],
)
def test_simpletuners_dead_settings_live_here(given: dict[str, Any], clip: str, t5: str, lines: list[str]) -> None:
    """They are carried over, T5's follows CLIP's when it is not set, and the report says that they did nothing there."""
    made, report = settings_of({"pretrained_model_name_or_path": "some/folder", **given}, "config.json")
    assert (made.model.sd3_clip_uncond_behaviour, made.model.sd3_t5_uncond_behaviour) == (clip, t5)
    said = "\n".join(map(str, report))
    assert all(line in said for line in lines)
    for key in given:
        assert any(line.key == key and line.fate == "was silently ignored there" for line in report)
