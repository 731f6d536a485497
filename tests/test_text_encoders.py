"""Text encoders that are read layer by layer are those that transformers loads whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from sd3tune import playground
from sd3tune.models.encoders import load_text_encoder
from sd3tune.models.quantize import quantise, tensors_of

CPU = torch.device("cpu")
PARTS = ((CLIPTextModelWithProjection, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"), (T5EncoderModel, "text_encoder_3"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "nf4-bnb"])
@pytest.mark.parametrize(("kind", "part"), PARTS, ids=lambda v: v if isinstance(v, str) else "")
def test_the_same_encoder_to_the_last_bit(kind: Any, part: str, precision: str, dtype: torch.dtype) -> None:
    """Every tensor, and what it says of a text."""
    folder = playground.MODEL / part
    whole = kind.from_pretrained(folder, dtype=dtype).eval()
    quantise(whole, precision)
    whole.eval()
    lean = load_text_encoder(kind, folder, precision, dtype, CPU)
    one, two = list(tensors_of(whole)), list(tensors_of(lean))
    assert len(one) == len(two) > 20
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in (whole, lean))
    assert torch.equal(expected, found)
    assert not lean.training
    if part == "text_encoder_3":
        assert lean.encoder.embed_tokens.weight is lean.shared.weight


def test_tables_of_old_files_are_left_alone(tmp_path: Path) -> None:
    """Old CLIP files hold position_ids, which are computed now."""
    folder = Path(shutil.copytree(playground.MODEL / "text_encoder", tmp_path / "clip"))
    held = load_file(folder / "model.safetensors")
    save_file({**held, "text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64)}, folder / "model.safetensors")
    lean = load_text_encoder(CLIPTextModelWithProjection, folder, "int8-quanto", torch.float32, CPU)
    assert lean.text_model.embeddings.position_ids[0, 5] == 5
