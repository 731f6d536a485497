"""The model card: what an adapter is, what it draws, how it was made, and code that uses it. No paths, no secrets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sd3tune.config.schema import RunConfig
from sd3tune.history import changes, reached
from sd3tune.models.components import base_name
from sd3tune.records import ImageRecord
from sd3tune.reporting.cleaning import shareable, without_places, without_tokens
from sd3tune.run_folder import RunFolder, step_of
from sd3tune.validation.sampler import Guidance
from sd3tune.validation.shots import Shot, shots_of
from sd3tune.validation.snippet import DTYPES, sample_code

COMMUNITY = "https://huggingface.co/{}/blob/main/LICENSE.md"
"""Where the licence of Stability AI's models stands (the Stability AI Community License)."""

SOLVERS = {"euler": "flow-matching Euler", "heun": "flow-matching Heun", "dpm": "DPM-Solver++(2M)", "unipc": "UniPC"}
UNKNOWN = Shot("a photograph", "a photograph", "", 1024, 1024, 42, 28, Guidance(3.0))
"""What the code draws when a run drew nothing."""


def card(folder: RunFolder, config: RunConfig, name: str) -> str:
    """The card of a run with its settings as they are now, as Markdown with the hub's fields on top; ``name`` is the repository's."""
    manifest: dict[str, Any] = json.loads(folder.manifest.read_text()) if folder.manifest.exists() else {}
    parts = [
        f"---\n{_as_yaml(_fields(folder, config, manifest))}---\n",
        f"# {folder.path.name}\n",
        _first_words(folder, config, name),
        "## How to use it\n",
        f"```python\n{sample_code(config, next(iter(shots_of(config)), UNKNOWN), name)}```\n",
        _strength(config),
        *(["## A note\n", f"{config.reporting.model_card_note}\n"] if config.reporting.model_card_note else []),
        "## How it was made\n",
        _training(folder, config, manifest),
        _datasets(manifest),
        "## Settings\n",
        f"<details><summary>what was set</summary>\n\n```yaml\n{_as_yaml(_set(config))}```\n\n</details>\n",
        _licence_words(config),
    ]
    lines = "\n".join(part for part in parts if part).splitlines()
    return "\n".join(without_tokens(line) if "https://" in line else without_places(line, folder.path) for line in lines) + "\n"


def _as_yaml(content: dict[str, Any]) -> str:
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    yaml.dump(content, stream)
    return stream.getvalue()


def _fields(folder: RunFolder, config: RunConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the hub reads: licence, base model, tags, and the pictures of its gallery."""
    found: dict[str, Any] = {**_licence(config)}
    if "/" in base_name(config):
        found["base_model"] = base_name(config)
    kind = "lora" if config.adapter.lora_type == "standard" else "lycoris"
    found |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    found["tags"] = ["text-to-image", "diffusers", "sd3", "sd3-diffusers", "sd3tune", kind, "template:sd-lora"]
    phrases = sorted({d["instance_prompt"] for d in manifest.get("datasets", ()) if d.get("instance_prompt")})
    if phrases:
        found["instance_prompt"] = phrases[0]
    rows = [(json.loads(path.with_suffix(".json").read_text()), path.name) for path in newest_pictures(folder)]
    if rows:
        found["widget"] = [
            {"text": row["prompt"], "output": {"url": f"images/{name}"}, "parameters": {"negative_prompt": row["shot"]["negative"]}}
            for row, name in rows
        ]
    return found


def newest_pictures(folder: RunFolder) -> list[Path]:
    """The pictures that were drawn last, and that no rewind has left behind."""
    rows = [row for row in folder.read_history() if row["type"] == ImageRecord.type and not row["problem"]]
    step = max((row["step"] for row in rows), default=0)
    found = {folder.images(step) / Path(row["path"]).name for row in rows if row["step"] == step}
    return sorted(path for path in found if path.exists() and path.with_suffix(".json").exists())


def _licence(config: RunConfig) -> dict[str, str]:
    flavour = config.model.model_flavour
    if flavour == "playground":
        return {"license": "apache-2.0"}
    base = base_name(config)
    if base.startswith("stabilityai/"):
        return {"license": "other", "license_name": "stabilityai-ai-community", "license_link": COMMUNITY.format(base)}
    return {"license": "other"}


def _licence_words(config: RunConfig) -> str:
    fields = _licence(config)
    if "license_link" in fields:
        link = f"[Stability AI Community License]({fields['license_link']})"
        return f"## Licence\n\nThe base model's: the {link}, also for what is made from it.\n"
    if config.model.model_flavour == "playground":
        return "## Licence\n\nThe base model's: Apache License 2.0.\n"
    return "## Licence\n\nThat of the base model; see there.\n"


def _first_words(folder: RunFolder, config: RunConfig, name: str) -> str:
    kind = "LoRA" if config.adapter.lora_type == "standard" else "LyCORIS adapter"
    base = "sd3tune's playground model" if config.model.model_flavour == "playground" else f"`{base_name(config)}`"
    lines = [f"A {kind} for {base}, trained with sd3tune.\n"]
    if folder.grid.exists():
        lines.append("![the base model's pictures above the adapter's](grid.png)\n")
    lines += [f"* {_quoted(prompt.prompt)}" for prompt in config.prompts if prompt.prompt]
    v, solver = config.validation, SOLVERS[config.validation.validation_noise_scheduler]
    facts = f"guidance {v.validation_guidance:g}, {v.validation_num_inference_steps} steps of {solver}, shift {v.validation_shift:g}"
    skipped = f", skip-layer guidance on blocks {list(v.validation_guidance_skip_layers)}" if v.validation_guidance_skip_layers else ""
    if config.prompts:
        lines.append(f"\nDrawn with {facts}{skipped}, {v.validation_resolution}, seed {config.validation_seed}.\n")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _strength(config: RunConfig) -> str:
    """What a loader must know of alpha and of the texts' length."""
    a, length = config.adapter, config.model.tokenizer_max_length
    lines = [f"Texts were {length} T5 tokens long in training, so `max_sequence_length={length}` belongs to it."]
    if a.lora_type == "lycoris":
        lines.append("The file carries its algorithm and alpha; it needs `pip install lycoris-lora`.")
    else:
        lines.append(
            f"Trained with rank {a.lora_rank} and alpha {config.lora_alpha:g}; alpha / rank is folded into the file's weights, and "
            "the file says alpha = rank, so a strength of 1 is what was trained. For ComfyUI: `sd3tune lora convert lora.safetensors --to "
            "comfyui --out comfyui.safetensors`."
        )
    if config.model.t5_padding == "zero":
        lines.append("T5's pads were zeros in training (`t5_padding: zero`), which a stock pipeline does not do: pictures differ a little.")
    if a.use_ema:
        lines.append("`lora-ema.safetensors` is its running average, in the same form.")
    return "\n".join(lines) + "\n"


def _training(folder: RunFolder, config: RunConfig, manifest: dict[str, Any]) -> str:
    o, data, history = config.optimizer, config.data, folder.read_history()
    evals = [row for row in history if row["type"] == "eval"]
    shift = config.flow_schedule_shift
    rows = [
        f"{reached(history)} updates of {data.train_batch_size} x {data.gradient_accumulation_steps} images; "
        f"{manifest.get('sentence', '')}",
        f"{o.optimizer}, learning rate {o.learning_rate:g}, {o.lr_scheduler} with {o.lr_warmup_steps} updates of warm-up, gradients "
        f"limited to {o.max_grad_norm:g} by {o.grad_clip_method}",
        f"flow matching, shift {'by size' if shift is None else f'{shift:g}'}, caption dropout {data.caption_dropout_probability:.0%}, "
        f"seed {config.schedule.seed}",
        f"{manifest.get('trainable_tensors', '?')} tensors, {manifest.get('trainable_parameters', 0):,} parameters; base precision "
        f"{config.model.base_model_precision}, computed in {DTYPES[config.model.mixed_precision]}",
    ]
    if evals:
        best = min(evals, key=lambda row: float(row["loss"]))
        rows.append(
            f"loss on {evals[-1]['images']} held-out images: {evals[0]['loss']:.4f} at step {evals[0]['step']}, "
            f"{evals[-1]['loss']:.4f} at step {evals[-1]['step']}, least {best['loss']:.4f} at step {best['step']}"
        )
    if drawn := newest_pictures(folder):
        rows.append(f"pictures above: step {step_of(drawn[0].parent)}")
    for change in changes(history):
        values = (f"{name} {json.dumps(value)}" for name, value in change["value"].items())
        rows.append(f"from step {change['step']} on: {', '.join(values)}")
    return "\n".join(f"* {row}" for row in rows) + "\n"


def _datasets(manifest: dict[str, Any]) -> str:
    """The data sets by their names, never by where they lie."""
    rows = []
    for row in manifest.get("datasets", ()):
        kind = {"eval": "held out", "conditioning": "masks"}.get(row.get("dataset_type", ""), "to learn from")
        kind = "to stay as it is on" if row.get("is_regularisation_data") else kind
        crop = "cropped" if row.get("crop") else "not cropped"
        rows.append(f"| {row['id']} | {kind} | {row.get('resolution', '')} | {crop} | {row.get('repeats', 0)} |")
    if not rows:
        return ""
    count = f"{manifest.get('images_used', 0)} images to learn from, {manifest.get('images_held_out', 0)} held out.\n"
    return "\n".join([count, "| data set | used | resolution | crop | repeats |", "|---|---|---|---|---|", *rows, ""])


def _set(config: RunConfig) -> dict[str, Any]:
    """Every setting that differs from its default, as plain data."""
    plain = RunConfig().leaves()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in shareable(config).items() if v != plain.get(k)}
