"""Mechanisms of attention: torch's own kernels agree, sageattention is compared before it is believed, and nothing outlives a block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import sd3tune as st
from sd3tune import playground
from sd3tune.errors import ModelError
from sd3tune.models import attention as module
from sd3tune.models import components
from sd3tune.models.attention import COMPARED, MECHANISMS, NATIVE, SAGE, attention, unable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def qkv(*, tokens: int = 20, width: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((1, 2, tokens, width), generator=rng).to(dtype) for _ in range(3))
    return q, k, v


def right(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, sm_scale: float | None = None) -> Tensor:
    """Attention in single precision, so that its bits are not torch's for halves."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal, scale=sm_scale).to(q.dtype)


class Package:
    """A made-up sageattention: notes what it is asked and answers with ``answer``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], bool, float | None]] = []
        self.answer: Callable[..., Tensor] = right

    def module(self, *names: str) -> ModuleType:
        made = ModuleType("sageattention")
        for name in names:
            setattr(made, name, self._function(name))
        return made

    def _function(self, name: str) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, sm_scale: float | None = None) -> Tensor:
            self.calls.append((name, tuple(q.shape), is_causal, sm_scale))
            return self.answer(q, k, v, is_causal, sm_scale)

        return function


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()
    monkeypatch.setitem(sys.modules, "sageattention", package.module(*SAGE.values()))
    return package


@pytest.fixture(autouse=True)
def _torch_is_as_before() -> Iterator[None]:
    """No test may leave anything behind: function, kernels, their order."""
    before = state()
    yield
    assert state() == before


def state() -> tuple[Any, ...]:
    """What torch would do with the next attention call."""
    cuda = torch.backends.cuda
    kernels = (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
    modes = torch.overrides._get_current_function_mode_stack()
    return F.scaled_dot_product_attention, kernels, tuple(torch._C._get_sdp_priority_order()), tuple(modes)


def kernels_used(run: Callable[[], object]) -> set[str]:
    """The kernels of attention that a piece of code runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run()
    return {event.key.removeprefix("aten::_scaled_dot_product_") for event in profiled.key_averages() if "aten::_scaled_dot" in event.key}


def velocity(transformer: Any) -> Tensor:
    """One forward of a transformer on noise."""
    rng, config = torch.Generator().manual_seed(3), transformer.config
    with torch.no_grad():
        found: Tensor = transformer(
            hidden_states=torch.randn((2, config.in_channels, 8, 8), generator=rng).to(transformer.dtype), timestep=torch.full((2,), 400.0),
            encoder_hidden_states=torch.randn((2, 24, config.joint_attention_dim), generator=rng).to(transformer.dtype),
            pooled_projections=torch.randn((2, config.pooled_projection_dim), generator=rng).to(transformer.dtype),
        ).sample  # fmt: skip
    return found


@pytest.fixture(scope="module")
def small() -> Any:
    """The playground's transformer."""
    return components.load_transformer(st.presets.playground(mixed_precision="no"), CPU).eval()


@pytest.fixture(scope="module")
def wide() -> Any:
    """Three random blocks with heads as wide as SD3's, one of them with dual attention: four calls a forward."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=64,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=16, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return model.to(torch.bfloat16).eval()


def test_torchs_own_kernels_agree(small: Any) -> None:
    """The playground's velocity to 1e-5; plain attention really runs, and only inside the block."""
    wanted = velocity(small)
    with attention("auto"):
        assert torch.equal(velocity(small), wanted)
        usual = kernels_used(lambda: velocity(small))
    for mechanism in NATIVE:
        with attention(mechanism):
            torch.testing.assert_close(velocity(small), wanted, atol=1e-5, rtol=1e-5)
    with attention("native-math"):
        assert kernels_used(lambda: velocity(small)) == {"attention_math"}
    assert "attention_math" not in usual
    assert kernels_used(lambda: velocity(small)) == usual


@pytest.mark.parametrize("mechanism", [name for name in MECHANISMS if name != "auto"])
def test_blocks_nest_come_again_and_end_by_errors(sage: Package, mechanism: str) -> None:
    """Each block puts back what was there when it began."""
    before, block = state(), attention(mechanism)
    with block:
        once = state()
        assert once != before
        with block, attention("sageattention"):
            assert state() != once
        assert state() == once
        with attention("auto"):
            assert state() == once
    assert state() == before
    with pytest.raises(KeyError, match="meant"), block:
        raise KeyError("meant")
    assert state() == before
    with block:
        assert state() == once


def test_the_inner_block_answers(sage: Package) -> None:
    """sageattention within torch's plain kernel, and two of its functions within each other."""
    q, k, v = qkv()
    with attention("native-math"), attention("sageattention"), attention("sageattention-int8-fp16-cuda"):
        F.scaled_dot_product_attention(q, k, v)
    assert {name for name, *_ in sage.calls} == {"sageattn_qk_int8_pv_fp16_cuda"} | {"sageattn"}, (
        "the outer one is what the inner compares with"
    )
    sage.calls.clear()
    with attention("sageattention"), attention("native-math"):
        F.scaled_dot_product_attention(q, k, v)
    assert [name for name, *_ in sage.calls] == ["sageattn"]


def test_diffusers_layers_ask_torch_themselves() -> None:
    """Why this module is there: SD3's processor knows no backend that could be set."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    assert not hasattr(JointAttnProcessor2_0(), "_attention_backend")


@pytest.mark.parametrize("mechanism", SAGE)
def test_a_right_answer_passes_through(sage: Package, wide: Any, mechanism: str) -> None:
    """Each mechanism has its function; every layer of the transformer asks it; what it answers is what comes out."""
    q, k, v = qkv()
    sage.answer = lambda *given: right(*given) * 1.0625
    with attention(mechanism):
        found = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(found, right(q, k, v) * 1.0625)
    assert sage.calls == [(SAGE[mechanism], (1, 2, 20, 64), False, None)]
    sage.calls.clear()
    sage.answer = right
    wanted = velocity(wide)
    with attention(mechanism):
        found = velocity(wide)
    assert [shape for _, shape, *_ in sage.calls] == [(2, 2, 40, 64), (2, 2, 16, 64), (2, 2, 40, 64), (2, 2, 40, 64)]
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    assert not torch.equal(found, wanted), "else the answers were not used"


WRONG: dict[str, Callable[..., Tensor]] = {
    "no scale": lambda q, k, v, causal, scale: right(q, k, v, causal, 1.0), "NaN": lambda *given: right(*given) * float("nan"),
    "another order of axes": lambda q, k, v, causal, scale: right(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2),
    "another sign": lambda *given: -right(*given), "a tenth more": lambda *given: right(*given) * 1.12,
    "another shape": lambda *given: right(*given)[:, :, :-1], "nothing": lambda *given: right(*given) * 0,
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_is_refused_on_the_first_call(sage: Package, fault: str) -> None:
    """With the mechanism, the difference, the limit, and what to set instead."""
    sage.answer = WRONG[fault]
    with pytest.raises(ModelError) as caught, attention("sageattention-int8-fp16-triton"):
        F.scaled_dot_product_attention(*qkv())
    said = str(caught.value)
    assert said.startswith(
        "attention_mechanism: sageattention-int8-fp16-triton gives wrong results here: the relative difference from torch's"
    )
    assert "the limit 0.1 (query (1, 2, 20, 64), torch.bfloat16); set attention_mechanism: auto, or install another version" in said
    assert len(sage.calls) == 1


def test_the_difference_is_the_relative_one(sage: Package) -> None:
    """Of norms: an answer a half too large differs by 0.5, however small the values are."""
    sage.answer = lambda *given: right(*given) * 1.5
    q, k, v = qkv()
    for size in (1.0, 1e-3):
        with pytest.raises(ModelError, match=r"attention is 0\.5, the limit"), attention("sageattention"):
            F.scaled_dot_product_attention(q, k, v * size)


def test_every_layer_of_the_first_forward_is_compared(sage: Package) -> None:
    """A fault that only the last layer shows is seen; after that, answers are believed, and each shape is compared by itself."""
    assert max(shape["num_layers"] for shape in components.SHAPES.values()) <= COMPARED
    block, given = attention("sageattention"), qkv()
    sage.answer = lambda *a: right(*a) if len(sage.calls) < COMPARED else right(*a) * 2
    with pytest.raises(ModelError, match="wrong results"), block:
        for _ in range(COMPARED):
            F.scaled_dot_product_attention(*given)
    assert len(sage.calls) == COMPARED
    sage.answer = right
    with block:
        F.scaled_dot_product_attention(*given)
    sage.answer = lambda *a: right(*a) * 2
    with block:
        assert torch.equal(F.scaled_dot_product_attention(*given), right(*given) * 2)
        with pytest.raises(ModelError, match=r"query \(1, 2, 21, 64\)"):
            F.scaled_dot_product_attention(*qkv(tokens=21))
    with pytest.raises(ModelError, match="wrong results"), attention("sageattention"):
        F.scaled_dot_product_attention(*given)


def test_scale_and_causality_are_handed_on(sage: Package) -> None:
    """By whatever names torch is called."""
    q, k, v = qkv()
    with attention("sageattention"):
        F.scaled_dot_product_attention(q, key=k, value=v, scale=0.3)
        F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    assert [call[2:] for call in sage.calls] == [(False, 0.3), (True, None)]


def calls_for_torch() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """What sageattention cannot do, by reason."""
    q, k, v = qkv()
    learning = q.clone().requires_grad_()
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    return {
        "mask": ((q, k, v), {"attn_mask": torch.ones((20, 20), dtype=torch.bool).tril()}),
        "mask of numbers": ((q, k, v, torch.zeros((20, 20), dtype=torch.bfloat16)), {}), "single precision": (qkv(dtype=torch.float32), {}),
        "narrow heads": (qkv(width=32), {}), "gradient": ((learning, k, v), {}), "three axes": ((q[0], k[0], v[0]), {}),
        "causal of two lengths": ((q[:, :, :7], k, v), {"is_causal": True}), "last axis is strided": ((strided, k, v), {}),
        "heads are shared": ((q, k[:, :1], v[:, :1]), {"enable_gqa": True}), "heads are spread": ((q, k[:, :1], v[:, :1]), {}),
        "values of another width": ((q, k, qkv(width=96)[2]), {}),
    }  # fmt: skip


@pytest.mark.parametrize("reason", calls_for_torch())
def test_what_it_cannot_do_goes_to_torch(sage: Package, reason: str) -> None:
    """Bit by bit what torch gives, and the package is not asked."""
    given, named = calls_for_torch()[reason]
    wanted = F.scaled_dot_product_attention(*given, **named)
    with attention("sageattention"):
        assert torch.equal(F.scaled_dot_product_attention(*given, **named), wanted)
    assert sage.calls == []


def test_dropout_goes_to_torch(sage: Package) -> None:
    """Which draws it from its own generator."""
    given = qkv()
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(*given, dropout_p=0.5)
    torch.manual_seed(1)
    with attention("sageattention"):
        assert torch.equal(F.scaled_dot_product_attention(*given, dropout_p=0.5), wanted)
    assert sage.calls == []


def test_other_models_are_not_touched(sage: Package, wide: Any) -> None:
    """Between two blocks the scorer and the autoencoder give what they gave before, and the package hears nothing of them."""
    from sd3tune.models.clip import Scorer

    scorer, vae = Scorer.load(playground.SCORER), components.load_vae(st.presets.playground(vae_dtype="fp32"), CPU)
    latent = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(1))

    def others() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return scorer._of_texts(["lock", "croissant"]), vae.decode(latent).sample

    before, block = others(), attention("sageattention")
    with block:
        velocity(wide)
    asked = len(sage.calls)
    assert all(torch.equal(a, b) for a, b in zip(others(), before, strict=True))
    with block:
        velocity(wide)
    assert asked == len(sage.calls) / 2 == 4


def test_other_threads_are_not_touched(sage: Package) -> None:
    """A thread that did not enter the block computes as ever."""
    given, found = qkv(), []
    with attention("sageattention"):
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(*given)))
        thread.start()
        thread.join()
    assert sage.calls == []
    assert torch.equal(found[0], F.scaled_dot_product_attention(*given))


def test_a_kernel_that_refuses_is_named(sage: Package) -> None:
    """Its own words, and what to set; want of memory stays what it is."""

    def fails(*_: Any) -> Tensor:
        raise AssertionError("Input tensors must be on cuda.")

    def is_full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    sage.answer = fails
    with (
        pytest.raises(ModelError, match=r"sageattention fails on this machine \(Input tensors must be on cuda\.\); set .*: auto"),
        attention("sageattention"),
    ):
        F.scaled_dot_product_attention(*qkv())
    sage.answer = is_full
    with pytest.raises(torch.OutOfMemoryError), attention("sageattention"):
        F.scaled_dot_product_attention(*qkv())


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it: nothing, and a version that lacks the function."""
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ModelError, match=r"sageattention needs sageattention \(.*\); pip install sageattention, or set .*: auto$"):
        attention("sageattention")
    assert "pip install sageattention, or" in unable("sageattention", GPU)
    monkeypatch.setitem(sys.modules, "sageattention", Package().module("sageattn"))
    with pytest.raises(
        ModelError, match=r"needs sageattention 2, which has sageattn_qk_int8_pv_fp8_cuda; pip install sageattention==2\.2\.0"
    ):
        attention("sageattention-int8-fp8-cuda")
    with attention("sageattention"):
        pass
    with pytest.raises(ModelError, match=r"there is no flash; it is one of auto, native-math, "):
        attention("flash")


def test_what_a_device_cannot_do_is_said_before(sage: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA; on an old GPU, and on one that has other kernels; on one of AMD; without cuDNN. Nothing is computed."""
    able = [name for name in MECHANISMS if not unable(name, CPU)]
    assert able == ["auto", "native-math", "native-flash"], "which the CPU has"
    assert unable("cudnn", CPU) == "attention_mechanism: cudnn needs a GPU of NVIDIA and this is cpu; set attention_mechanism: auto"
    assert "this is mps" in unable("native-math", torch.device("mps"))

    def on(*capability: int) -> dict[str, str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return {name: unable(name, GPU) for name in MECHANISMS}

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert [name for name, why in on(7, 5).items() if not why] == ["auto", "native-math", "native-efficient"]
    assert (
        on(7, 5)["cudnn"]
        == "attention_mechanism: cudnn needs compute capability 8.0 or more, the GPU has 7.5; set attention_mechanism: auto"
    )
    assert not any(on(8, 9).values())
    assert [name for name, why in on(8, 6).items() if why] == ["sageattention-int8-fp8-cuda"]
    assert [name for name, why in on(9, 0).items() if why] == ["sageattention-int8-fp8-cuda"]
    assert on(9, 0)["sageattention-int8-fp8-cuda"].endswith(
        "needs compute capability 8.9 or more and less than 9.0, the GPU has 9.0; "
        "set attention_mechanism: sageattention, which picks the kernel for the GPU, or auto"
    )
    assert [name for name, why in on(12, 0).items() if not why] == [*list(MECHANISMS)[:5], "sageattention"]
    assert sage.calls == []
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cudnn, "is_available", lambda: False)
        assert "needs cuDNN, which this torch has not" in on(9, 0)["cudnn"]
    monkeypatch.setattr(module.torch, "version", SimpleNamespace(hip="6.2"))
    assert [name for name, why in on(9, 4).items() if not why] == ["auto", "native-math", "native-efficient", "native-flash"]
    assert "this is one of AMD" in on(9, 4)["sageattention"]
