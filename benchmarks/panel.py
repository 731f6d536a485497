"""What the panel costs an update: a run that a training panel shows, against ``trainer.step()`` in a loop.

Two kernels, as notebooks have them, take turns; the shown run is paused meanwhile. Process time of each kernel, so that drawing, the
messages to the page and the run's bookkeeping count; one torch thread. The figure is the median of the ratios. A shared machine's noise is
larger than what is looked for, so the shown kernel's time is also split: what it spends within ``trainer.step()`` and all that it spends
outside of it, in whatever thread, while the run goes on.
python benchmarks/panel.py [--pairs 24] [--updates 20] [--counted 200]
"""

from __future__ import annotations

import argparse
import ast
import statistics
import tempfile
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

SET_UP = """
import time, torch
import sd3tune as st
from sd3tune import panels, playground
torch.set_num_threads(1)
config = st.presets.playground(
    output_dir={folder!r} + "/runs/{arm}", cache_dir={folder!r} + "/cache", validation_prompt=(), lr_scheduler="constant",
    max_train_steps=100_000, checkpoint_step_interval=1_000_000, checkpoint_minutes=0, eval_steps_interval=0,
)
cache = st.CacheBuilder(st.plan(st.discover(playground.DATASETS), config), st.encoders(config)).build()

def timed(work):
    started, before = time.process_time(), done()
    work()
    return (time.process_time() - started) / (done() - before)
"""

ARMS = {
    "plain": """
trainer = st.Trainer(config, cache)
done = lambda: trainer.steps_done
def stretch(updates):
    for _ in range(updates):
        trainer.step()
""",
    "panel": """
class Counted(st.Trainer):
    within = 0.0
    def step(self):
        started = time.thread_time()
        record = super().step()
        Counted.within += time.thread_time() - started
        return record

def outside(updates):
    started, before = time.process_time(), Counted.within
    stretch(updates)
    within = Counted.within - before
    return (time.process_time() - started - within) / within

panel = panels.TrainingPanel(config, cache, make=Counted)
display(panel)
panel.start()
run = panel.runner
run.wait(until=lambda now: now.step >= 1)
run.send("pause")
run.wait(until="paused")
done = lambda: run.snapshot.step
def stretch(updates):
    last = done() + updates
    run.send("go_on")
    run.wait(until=lambda now: now.step >= last)
    run.send("pause")
    run.wait(until="paused")
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--counted", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = {arm: Kernel() for arm in ARMS}
        try:
            for arm, kernel in kernels.items():
                kernel.run(SET_UP.format(folder=folder, arm=arm) + ARMS[arm])
            compare(kernels, options.pairs, options.updates)
            for _ in range(3):
                share = kernels["panel"].value(f"outside({options.counted})")
                print(f"outside of trainer.step() the shown kernel takes {share:.4f} of the time within, over {options.counted} updates")
        finally:
            for kernel in kernels.values():
                kernel.end()


def compare(kernels: dict[str, Kernel], pairs: int, updates: int) -> None:
    """Interleaved stretches; the first pair loads what is loaded once and does not count."""
    ratios = []
    for pair in range(pairs + 1):
        arms = list(kernels) if pair % 2 else list(reversed(kernels))
        seconds = {arm: kernels[arm].value(f"timed(lambda: stretch({updates}))") for arm in arms}
        if pair:
            ratios.append(seconds["panel"] / seconds["plain"])
            print(f"plain {seconds['plain']:.4f} s, panel {seconds['panel']:.4f} s, ratio {ratios[-1]:.4f}", flush=True)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"median ratio {statistics.median(ratios):.4f} (quartiles {low:.3f} to {high:.3f}) over {len(ratios)} pairs of {updates} updates")
    print("messages to the page:", kernels["panel"].messages)


class Kernel:
    """An ipykernel that is told what to run."""

    def __init__(self) -> None:
        self._manager, client = start_new_kernel(kernel_name="python3")
        assert isinstance(client, BlockingKernelClient)
        self._client, self.messages = client, 0

    def run(self, code: str) -> None:
        """Raises: RuntimeError with the kernel's error."""
        reply = self._client.execute_interactive(code, timeout=600, output_hook=self._count)
        if reply["content"]["status"] != "ok":
            raise RuntimeError("\n".join(reply["content"]["traceback"]))

    def value(self, code: str) -> float:
        """The value of an expression."""
        reply = self._client.execute_interactive("", user_expressions={"it": code}, timeout=600, output_hook=self._count)
        found: dict[str, Any] = reply["content"]["user_expressions"]["it"]
        if found["status"] != "ok":
            raise RuntimeError("\n".join(found["traceback"]))
        return float(ast.literal_eval(found["data"]["text/plain"]))

    def _count(self, message: dict[str, Any]) -> None:
        self.messages += message["msg_type"] == "comm_msg"

    def end(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
