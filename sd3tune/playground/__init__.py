"""The small trained SD3.5 and the pictures that come with the package."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
"""A StableDiffusion3Pipeline in the diffusers folder layout."""
PREVIEWER = HERE / "taesd"
"""An AutoencoderTiny for the same latents."""
SCORER = HERE / "scorer"
"""A CLIPModel with its tokenizer."""
PICTURES = HERE / "pictures"
"""``train`` and ``heldout``: Fluent emoji with captions."""
DATASETS = HERE / "datasets.yaml"
"""Those pictures as a ``datasets.yaml``: ``st.discover(playground.DATASETS)``, in any folder."""
