"""After an error inside a step the same kernel has its memory back."""

from __future__ import annotations

import sys
from pathlib import Path

import fresh
import pytest
from conftest import Workbench

KERNEL = """
import sys, weakref, gc, torch
from IPython.core.interactiveshell import InteractiveShell
import sd3tune as st
shell = InteractiveShell.instance()
shell.run_cell("import sys, torch, sd3tune as st")
class Failing:
    def __init__(self, velocity, error):
        self.velocity, self.error = velocity, error
    def __call__(self, *inputs):
        made = self.velocity(*inputs)
        raise self.error
shell.user_ns["Failing"] = Failing
def alive():
    gc.collect()
    return sum(o.untyped_storage().nbytes() for o in {id(t): t for t in gc.get_objects() if isinstance(t, torch.Tensor)}.values())
path = sys.argv[1]
def build(precision):
    shell.run_cell(
        f"trainer = st.Trainer(config.replace(base_model_precision={precision!r}), cache)\\ntrainer.step().loss").raise_error()
shell.run_cell(f"config = st.RunConfig.load({path!r})").raise_error()
shell.run_cell(
    f"cache = st.CacheBuilder(st.plan(st.discover({sys.argv[2]!r}), config), st.encoders(config)).build()").raise_error()
build("no_change")  # what libraries load and the cache reads for the first time stays
shell.run_cell("trainer.step().loss").raise_error()
shell.run_cell("del trainer\\nst.free()").raise_error()
before = alive()
errors = ("torch.OutOfMemoryError('made up')", "KeyboardInterrupt()")
for error in errors:
    for precision in ("int8-quanto", "no_change"):
        if sys.argv[3] == "each once" and (error, precision) not in zip(errors, ("int8-quanto", "no_change")):
            continue
        build(precision)
        trainer = shell.user_ns["trainer"]
        refs = [weakref.ref(part) for part in (trainer, trainer.transformer, trainer.engine, trainer.engine._optimizer)]
        del trainer
        shell.run_cell(f"trainer.engine.velocity = Failing(trainer.engine.velocity, {error})").raise_error()
        failed = shell.run_cell("trainer.step()")
        assert failed.error_in_exec is not None
        del failed
        shell.run_cell("del trainer\\nst.free()").raise_error()
        assert [ref() for ref in refs] == [None] * 4, [type(ref()) for ref in refs]
        after = alive()
        assert after <= before + 200_000, (error, precision, before, after)
build("int8-quanto")
print("well", before)
"""


@pytest.mark.parametrize("which", ["each once", pytest.param("all", marks=pytest.mark.full)])
def test_memory_comes_back_after_an_error(bench: Workbench, tmp_path: Path, which: str) -> None:
    """Out of memory and an interrupt inside a step: names dead, tensors back to the start, and the next trainer works."""
    config = bench.config(lora_targets=("to_q",))
    config.save(tmp_path / "run.yaml")
    assert "well" in fresh.run(["-c", KERNEL, str(tmp_path / "run.yaml"), str(bench.datasets), which], tmp_path / "said.txt")


def test_free_may_be_called_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, and with one that was raised while another was handled."""
    import sd3tune as st

    st.free()
    try:
        try:
            raise ValueError("one")
        except ValueError:
            raise KeyError("two")  # noqa: B904 - the context is the point
    except KeyError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
        st.free()
