"""Changing one setting encodes exactly what it must: a row for every setting of a run and every key of datasets.yaml."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sd3tune as st
from sd3tune import playground
from sd3tune.cache import CacheBuilder
from sd3tune.data import Dataset

NONE, SOME, ALL = "none", "some", "all"

SETTINGS: dict[str, tuple[Any, str, str]] = {
    "model_flavour": (None, ALL, ALL), "pretrained_model_name_or_path": ("other model", ALL, ALL),
    "mixed_precision": ("bf16", NONE, ALL), "base_model_precision": ("int8-quanto", NONE, NONE), "tokenizer_max_length": (12, NONE, ALL),
    "sd3_clip_uncond_behaviour": ("zero", NONE, NONE), "sd3_t5_uncond_behaviour": ("zero", NONE, NONE),
    "caption_dropout_mode": ("per_encoder", NONE, NONE),
    "t5_padding": ("zero", NONE, ALL), "vae_dtype": ("bf16", ALL, NONE), "vae_enable_tiling": (True, ALL, NONE),
    "vae_enable_slicing": (True, ALL, NONE),
    "revision": ("main", NONE, NONE), "variant": ("fp16", NONE, NONE), "base_model_default_dtype": ("fp32", NONE, NONE),
    "modulation_precision": ("bf16", NONE, NONE),
    "text_encoder_1_precision": ("int8-quanto", NONE, ALL), "text_encoder_2_precision": ("nf4-bnb", NONE, ALL),
    "text_encoder_3_precision": ("fp8-quanto", NONE, ALL), "use_t5": (False, NONE, ALL), "lora_init_type": ("gaussian", NONE, NONE),
    "use_ema": (True, NONE, NONE), "ema_decay": (0.9, NONE, NONE), "ema_update_interval": (2, NONE, NONE), "use_dora": (True, NONE, NONE),
    "lora_type": ("lycoris", NONE, NONE), "lycoris_config": (None, NONE, NONE),
    "lora_rank_pattern": ({"to_q": 2}, NONE, NONE), "init_lora": ("a.safetensors", NONE, NONE), "ema_device": ("cpu", NONE, NONE),
    "validation_lycoris_strength": (0.5, NONE, NONE), "gradient_checkpointing": (True, NONE, NONE),
    "lora_rank": (4, NONE, NONE), "lora_alpha": (4.0, NONE, NONE), "lora_dropout": (0.1, NONE, NONE),
    "lora_targets": ("attention", NONE, NONE),
    "train_batch_size": (2, NONE, NONE), "gradient_accumulation_steps": (2, NONE, NONE), "vae_batch_size": (2, NONE, NONE),
    "write_batch_size": (2, NONE, NONE), "latent_draw": ("sample", NONE, NONE), "text_encoder_batch_size": (3, NONE, NONE),
    "caption_dropout_probability": (0.5, NONE, NONE), "aspect_bucket_alignment": (32, SOME, NONE), "small_bucket": ("merge", SOME, NONE),
    "allow_dataset_oversubscription": (True, NONE, NONE), "allow_missing_captions": (True, NONE, NONE),
    "flow_schedule_shift": (1.0, NONE, NONE), "flow_schedule_auto_shift": (True, NONE, NONE),
    "flow_use_uniform_schedule": (True, NONE, NONE), "flow_use_beta_schedule": (True, NONE, NONE),
    "flow_beta_schedule_alpha": (3.0, NONE, NONE), "flow_beta_schedule_beta": (3.0, NONE, NONE),
    "flow_cubic_schedule_weights": ((1.0, 2.0), NONE, NONE), "flow_custom_timesteps": ((500.0,), NONE, NONE),
    "flow_timesteps_mode": ("round-robin", NONE, NONE), "loss_type": ("huber", NONE, NONE), "huber_c": (0.2, NONE, NONE),
    "loss_weighting": ("cosmap", NONE, NONE), "input_perturbation": (0.1, NONE, NONE), "optimizer_config": ("eps=1e-6", NONE, NONE),
    "optimizer_beta1": (0.8, NONE, NONE), "optimizer_beta2": (0.99, NONE, NONE), "lr_num_cycles": (2, NONE, NONE),
    "lr_power": (1.0, NONE, NONE), "lr_end": (1e-6, NONE, NONE), "grad_clip_method": ("value", NONE, NONE),
    "mask_normalise": (False, NONE, NONE), "masked_loss_probability": (0.5, NONE, NONE), "regularisation_weight": (0.5, NONE, NONE),
    "scheduled_sampling_max_step_offset": (3, NONE, NONE), "scheduled_sampling_strategy": ("biased_late", NONE, NONE),
    "scheduled_sampling_probability": (0.5, NONE, NONE), "scheduled_sampling_prob_start": (0.1, NONE, NONE),
    "scheduled_sampling_prob_end": (0.2, NONE, NONE), "scheduled_sampling_ramp_steps": (10, NONE, NONE),
    "scheduled_sampling_start_step": (5, NONE, NONE), "scheduled_sampling_ramp_shape": ("cosine", NONE, NONE),
    "scheduled_sampling_sampler": ("dpm", NONE, NONE), "scheduled_sampling_order": (1, NONE, NONE),
    "scheduled_sampling_target": ("straight", NONE, NONE), "scheduled_sampling_reflexflow": (True, NONE, NONE),
    "scheduled_sampling_reflexflow_alpha": (2.0, NONE, NONE), "scheduled_sampling_reflexflow_beta1": (1.0, NONE, NONE),
    "scheduled_sampling_reflexflow_beta2": (2.0, NONE, NONE),
    "guard_policy": ("skip", NONE, NONE), "guard_rollbacks": (1, NONE, NONE), "checkpoint_minutes": (1.0, NONE, NONE),
    "checkpoint_keep_best": (False, NONE, NONE), "mirror_to": ("copy", NONE, NONE), "disk_low_threshold": (1.0, NONE, NONE),
    "flow_sigmoid_scale": (2.0, NONE, NONE), "stratified": (False, NONE, NONE),
    "optimizer": ("lion", NONE, NONE), "learning_rate": (1e-5, NONE, NONE), "lr_scheduler": ("constant", NONE, NONE),
    "lr_warmup_steps": (3, NONE, NONE), "max_grad_norm": (0.1, NONE, NONE), "max_train_steps": (50, NONE, NONE),
    "num_train_epochs": (2, NONE, NONE), "seed": (7, NONE, NONE), "checkpoint_step_interval": (5, NONE, NONE),
    "checkpoints_total_limit": (1, NONE, NONE), "validation_prompt": (("lock", "a new prompt"), NONE, SOME),
    "validation_negative_prompt": ("ugly", NONE, SOME), "validation_resolution": ("48x80", NONE, NONE),
    "validation_guidance": (5.0, NONE, NONE),
    "validation_num_inference_steps": (3, NONE, NONE), "validation_seed": (3, NONE, NONE), "validation_steps": (5, NONE, NONE),
    "validation_shift": (1.0, NONE, NONE), "validation_guidance_skip_layers": ((1,), NONE, NONE),
    "validation_guidance_skip_layers_start": (0.1, NONE, NONE), "validation_guidance_skip_layers_stop": (0.5, NONE, NONE),
    "validation_guidance_skip_scale": (1.0, NONE, NONE), "eval_steps_interval": (5, NONE, NONE), "num_eval_images": (1, NONE, NONE),
    "eval_timesteps": (2, NONE, NONE), "eval_loss_disable": (True, NONE, NONE), "eval_epoch_interval": (0.5, NONE, NONE),
    "eval_dataset_pooling": (True, NONE, NONE), "eval_dataset_id": (None, NONE, NONE), "output_dir": ("elsewhere", NONE, NONE),
    "cache_dir": ("other cache", NONE, NONE), "num_processes": (2, NONE, NONE), "report_to": ("all", NONE, NONE),
    "tracker_project_name": ("pots", NONE, NONE),
    "tracker_run_name": ("first", NONE, NONE), "push_to_hub": (True, NONE, NONE), "push_checkpoints_to_hub": (False, NONE, NONE),
    "hub_model_id": ("me/pots", NONE, NONE), "model_card_private": (False, NONE, NONE), "model_card_note": ("mine", NONE, NONE),
    "webhook_config": ("hook.json", NONE, NONE), "webhook_reporting_interval": (5, NONE, NONE),
}  # fmt: skip
"""Setting -> another value, and which latents and texts it needs that the base does not have."""

TABLE: dict[str, Any] = {"caption_strategy": "csv", "csv_file": "table.csv"}
HUB: dict[str, Any] = {"type": "huggingface", "dataset_name": "hub", "caption_strategy": "huggingface", "image_column": "image"}
CUT: dict[str, Any] = {"crop": True, "crop_aspect": "square"}
KEYS: dict[str, tuple[dict[str, Any], Any, str, str]] = {
    "id": ({}, "renamed", NONE, NONE), "instance_data_dir": ({}, "more", SOME, SOME), "type": (HUB, "huggingface", NONE, NONE),
    "dataset_type": ({}, "image", NONE, NONE), "eval_share": ({}, 0.5, NONE, NONE), "disabled": ({}, False, NONE, NONE),
    "resolution": ({}, 96, ALL, NONE), "resolution_type": ({}, "pixel", SOME, NONE), "crop": ({"crop_aspect": "square"}, True, SOME, NONE),
    "crop_aspect": ({"crop": True, "crop_aspect_buckets": [0.6, 1.67]}, "closest", ALL, NONE),
    "crop_aspect_buckets": ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, [1.0, 1.67], SOME, NONE),
    "crop_style": (CUT, "corner", SOME, NONE), "crop_variants": ({**CUT, "crop_style": "random"}, 3, SOME, NONE),
    "background": ({}, "black", ALL, NONE), "flip": ({}, "horizontal", SOME, NONE), "max_upscale_threshold": ({}, 0.5, NONE, NONE),
    "minimum_image_size": ({}, 110, NONE, NONE),
    "maximum_image_size": ({**CUT, "maximum_image_size": 300, "target_downsample_size": 100}, 140, SOME, NONE),
    "target_downsample_size": ({**CUT, "maximum_image_size": 140, "target_downsample_size": 100}, 90, SOME, NONE),
    "minimum_aspect_ratio": ({}, 0.9, NONE, NONE), "maximum_aspect_ratio": ({}, 1.1, NONE, NONE),
    "caption_strategy": ({}, "filename", NONE, SOME),
    "instance_prompt": ({"prepend_instance_prompt": True, "instance_prompt": "a"}, "b", NONE, SOME),
    "prepend_instance_prompt": ({"instance_prompt": "a"}, True, NONE, SOME),
    "only_instance_prompt": ({"instance_prompt": "a"}, True, NONE, SOME),
    "disable_multiline_split": ({}, True, NONE, SOME), "caption_shuffle": ({}, {"count": 2}, NONE, SOME),
    "caption_filter_list": ({}, ["red"], NONE, SOME), "caption_dropout": ({}, 0.9, NONE, NONE),
    "csv_file": (TABLE, "other.csv", NONE, SOME),
    "csv_caption_column": (TABLE, "words", NONE, SOME),
    "csv_url_column": ({"type": "csv", "csv_file": "table.csv", "csv_url_column": "file_name"}, "second", ALL, NONE),
    "dataset_name": (HUB, "hub2", SOME, SOME), "split": (HUB, "train[:3]", NONE, NONE), "image_column": (HUB, "image2", ALL, NONE),
    "caption_column": (HUB, "words", NONE, SOME),
    "parquet": ({"caption_strategy": "jsonl", "parquet": {"path": "t.jsonl"}}, {"path": "t.jsonl", "caption_column": "words"}, NONE, SOME),
    "repeats": ({}, 2, NONE, NONE), "probability": ({}, 3.0, NONE, NONE), "max_num_samples": ({}, 3, NONE, NONE),
    "train_batch_size": ({}, 2, NONE, NONE), "start_step": ({}, 3, NONE, NONE), "end_step": ({}, 30, NONE, NONE),
    "conditioning_type": ({"conditioning_data": "masks", "conditioning_type": "mask"}, "segmentation", NONE, NONE),
    "conditioning_data": ({}, "masks", NONE, NONE), "mask_from_alpha": ({"instance_data_dir": "alpha"}, True, NONE, NONE),
    "is_regularisation_data": ({}, True, NONE, NONE),
    "start_epoch": ({}, 2, NONE, NONE), "end_epoch": ({}, 3, NONE, NONE), "timestep_sampling_offset": ({}, 0.5, NONE, NONE),
}  # fmt: skip
"""Key -> what stands beside it, another value, and which latents and texts that needs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of five shapes, tables of captions, two data sets in the hub's layout, and a copy of the model with other weights."""
    import datasets

    root = tmp_path_factory.mktemp("table")
    sizes = [(128, 128), (128, 128), (160, 96), (96, 160), (200, 128), (256, 250)]
    for where in ("in", "more", "second", "alpha"):
        (root / where).mkdir()
        for n, size in enumerate(sizes):
            pixels = np.random.default_rng(n + 10 * (where == "second")).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            name = f"{'other ' if where == 'second' else ''}{n}.png"
            picture = Image.fromarray(pixels)
            (picture.convert("RGBA") if where == "alpha" else picture).save(root / where / name)
            (root / where / name).with_suffix(".txt").write_text(f"red, pot {n}, clay\nsecond line {n}")
    Image.new("RGB", (128, 128), "red").save(root / "more" / "new.png")
    (root / "more" / "new.txt").write_text("new")
    rows = [f"{n}.png,caption {n},words {n},../second/other {n}.png" for n in range(6)]
    for name, more in (("table", ""), ("other", "!")):
        (root / f"{name}.csv").write_text(
            "\n".join(["file_name,caption,words,second", *(row.replace(",words", f"{more},words") for row in rows)])
        )
    lines = [json.dumps({"file_name": f"{n}.png", "caption": f"c {n}", "words": f"w {n}"}) for n in range(6)]
    (root / "t.jsonl").write_text("\n".join(lines))
    for name, first in (("hub", 0), ("hub2", 1)):
        columns: dict[str, Any] = {
            "image": [{"bytes": (root / "in" / f"{n}.png").read_bytes(), "path": None} for n in range(first, 6)],
            "image2": [{"bytes": (root / "second" / f"other {n}.png").read_bytes(), "path": None} for n in range(first, 6)],
            "caption": [f"c {n + 10 * first}" for n in range(first, 6)], "words": [f"w {n}" for n in range(first, 6)],
        }  # fmt: skip
        if first:
            columns["image"][0] = columns["image2"][0]
        features = datasets.Features({n: datasets.Image() if "image" in n else datasets.Value("string") for n in columns})
        (root / name).mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / name / "train.parquet"))
    shutil.copytree(playground.MODEL, root / "other model")
    for part in ("vae", "text_encoder"):
        (root / "other model" / part / "note.txt").write_text("other weights")
    return root


def needed(folder: Path, entry: dict[str, Any], **settings: Any) -> dict[str, set[str]]:
    """The keys that a plan needs, of latents and of texts."""
    rows = [{"id": "base", "instance_data_dir": "in", "resolution": 64, **entry}]
    if any(key in entry for key in ("start_step", "end_step", "start_epoch", "end_epoch", "is_regularisation_data")):
        rows.append({"id": "always", "instance_data_dir": "in", "resolution": 64})
    if "conditioning_data" in entry:
        kind = rows[0].pop("conditioning_type", "mask")
        rows.append({"id": "masks", "instance_data_dir": "in", "dataset_type": "conditioning", "conditioning_type": kind})
    for row in rows:
        if row.get("type") == "huggingface":
            row["dataset_name"] = str(folder / str(row["dataset_name"]))
            del row["instance_data_dir"]
        for key in ("csv_file",):
            if key in row:
                row[key] = str(folder / str(row[key]))
        if "parquet" in row:
            row["parquet"] = {**row["parquet"], "path": str(folder / row["parquet"]["path"])}
    (folder / "datasets.yaml").write_text(json.dumps(rows))
    config = st.presets.playground(**{"validation_prompt": ("lock",), "lr_warmup_steps": 0, "cache_dir": str(folder / "cache"), **settings})
    builder = CacheBuilder(st.plan(st.discover(folder / "datasets.yaml"), config), st.encoders(config))
    found: dict[str, set[str]] = {"latents": set(), "texts": set(), "masks": set()}
    for kind, key, _ in builder.wanted():
        found[kind].add(key)
    return found


def share(before: set[str], after: set[str]) -> str:
    fresh = after - before
    return NONE if not fresh else ALL if fresh == after else SOME


@pytest.mark.parametrize("name", list(st.presets.playground().leaves()))
def test_settings(folder: Path, name: str) -> None:
    """What a setting needs anew is what the table says."""
    value, latents, texts = SETTINGS[name]
    settings: dict[str, Any] = {name: value}
    if name in ("model_flavour", "pretrained_model_name_or_path"):
        settings = {"model_flavour": None, "pretrained_model_name_or_path": str(folder / "other model")}
    if name == "num_train_epochs":
        settings["max_train_steps"] = None
    if name == "small_bucket":
        settings["train_batch_size"] = 2
    entry: dict[str, Any] = {}
    before, after = needed(folder, entry), needed(folder, entry, **settings)
    assert (share(before["latents"], after["latents"]), share(before["texts"], after["texts"])) == (latents, texts)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Dataset)])
def test_keys(folder: Path, name: str) -> None:
    """What a key of datasets.yaml needs anew is what the table says."""
    beside, value, latents, texts = KEYS[name]
    before, after = needed(folder, beside), needed(folder, {**beside, name: value})
    assert (share(before["latents"], after["latents"]), share(before["texts"], after["texts"])) == (latents, texts)
