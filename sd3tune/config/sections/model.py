"""Settings of what is trained: the base, the adapter, and what is traded for memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import STRICT, about

Precision = Literal["no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]
"""Formats in which frozen weights can be kept."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Which base model, and in which numbers."""

    model_flavour: Annotated[
        Literal["playground", "sd3-medium", "sd35-medium", "sd35-large"] | None, about("A known model; leave it out when a path is given.")
    ] = None
    pretrained_model_name_or_path: Annotated[
        str | None,
        about(
            "A folder in the diffusers layout, owner/name on the hub, or a .safetensors file with the transformer, beside model_flavour."
        ),
    ] = None
    revision: Annotated[str | None, about("Which version of a model of the hub: a branch, a tag or a commit.")] = None
    variant: Annotated[str | None, about("Which of several files of the transformer's weights, such as fp16.")] = None
    mixed_precision: Annotated[Literal["bf16", "fp16", "no"], about("Number format of the forward pass; the adapter stays in fp32.")] = (
        "bf16"
    )
    base_model_precision: Annotated[Precision, about("Number format in which the frozen base weights are kept.")] = "no_change"
    base_model_default_dtype: Annotated[
        Literal["bf16", "fp32"], about("Format of base weights that are not quantised; bf16 means that of the forward pass.")
    ] = "bf16"
    modulation_precision: Annotated[
        Literal["same", "bf16"], about("The AdaLN linears, a third of all weights: quantised like the rest, or left alone.")
    ] = "same"
    text_encoder_1_precision: Annotated[Precision, about("Number format of CLIP-L's weights.")] = "no_change"
    text_encoder_2_precision: Annotated[Precision, about("Number format of CLIP-G's weights.")] = "no_change"
    text_encoder_3_precision: Annotated[Precision, about("Number format of T5's weights.")] = "no_change"
    use_t5: Annotated[bool, about("Read texts with T5 too; without it zeros stand in its place.")] = True
    tokenizer_max_length: Annotated[int, about("Length of every text for T5.", low=1, high=512, unit="tokens")] = 154
    t5_padding: Annotated[
        Literal["unmodified", "zero"], about("What follows a text's T5 states up to that length: what T5 makes of pads, or zeros.")
    ] = "unmodified"
    sd3_clip_uncond_behaviour: Annotated[
        Literal["empty_string", "zero"],
        about("What the two CLIPs give for no text (a dropped caption, an empty negative prompt): that of the empty text, or zeros."),
    ] = "empty_string"
    sd3_t5_uncond_behaviour: Annotated[Literal["empty_string", "zero"], about("The same of T5.")] = "empty_string"
    attention_mechanism: Annotated[
        Literal[
            "auto", "native-math", "native-efficient", "native-flash", "cudnn", "sageattention", "sageattention-int8-fp16-triton",
            "sageattention-int8-fp16-cuda", "sageattention-int8-fp8-cuda",
        ],
        about("How the pictures' forwards compute attention; training always uses torch's own."),
    ] = "auto"  # fmt: skip
    vae_dtype: Annotated[Literal["bf16", "fp16", "fp32"], about("Number format of the autoencoder.")] = "bf16"
    vae_enable_tiling: Annotated[bool, about("Encode and decode in tiles: less memory, values that differ slightly at their edges.")] = (
        False
    )
    vae_enable_slicing: Annotated[bool, about("Encode and decode one picture at a time: less memory.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Adapter:
    """The part that learns."""

    lora_type: Annotated[Literal["standard", "lycoris"], about("LoRA, or one of LyCORIS' kinds as lycoris_config says.")] = "standard"
    lycoris_config: Annotated[str | None, about("A JSON file like SimpleTuner's lycoris_config.json; its example when left out.")] = None
    lora_rank: Annotated[int, about("Rank of the two factors of each weight change.", low=1, high=1024)] = 16
    lora_alpha: Annotated[float | None, about("The change is scaled by alpha / rank; the rank when left out.", above=0, high=1e5)] = None
    lora_dropout: Annotated[float, about("Share of the adapter's inputs set to zero while training.", low=0, high=0.9)] = 0.0
    lora_targets: Annotated[
        Literal["attention", "attention+context", "all-linear"] | tuple[str, ...],
        about("Which linear layers get an adapter: the picture stream's attention, the text stream's too, all, or a list of name endings."),
    ] = "attention"
    lora_init_type: Annotated[
        Literal["default", "gaussian"], about("How A begins: as peft does (Kaiming), or as a Gaussian; B begins with zeros.")
    ] = "default"
    lora_rank_pattern: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=1024)]] | None, about("Other ranks for layers whose name ends so, such as {to_out.0: 4}.")
    ] = None
    init_lora: Annotated[str | None, about("A LoRA file to begin with, of any tool; LyCORIS needs one of the same kind.")] = None
    use_ema: Annotated[bool, about("Also keep a running average of the adapter, saved beside it.")] = False
    ema_decay: Annotated[float, about("How much of the average stays at each of its updates, at most.", low=0, high=1)] = 0.995
    ema_update_interval: Annotated[int, about("Updates between two of the average's.", low=1, high=10_000, unit="updates")] = 1
    ema_device: Annotated[Literal["accelerator", "cpu"], about("Where the average is kept.")] = "accelerator"
    use_dora: Annotated[bool, about("Learn each weight's length and direction apart; about a third slower.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Memory:
    """What is traded for memory."""

    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        about("Make each block's activations anew in the backward pass: a third slower, a tenth of their memory; auto on GPUs."),
    ] = "auto"
