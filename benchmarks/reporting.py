"""What trackers and webhooks cost an update: TensorBoard and a webhook that answers after half a second, against none of it.

One torch thread, the two arms interleaved step by step in one process, the webhook's server in another. Each arm's time holds its update
and a short rest in which its senders work, so that their process time counts; the rest is taken off the clock's. A tenth of the steps
also have a picture. The figure is the median of the ratios. python benchmarks/reporting.py [--pairs 40]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import sd3tune as st
from sd3tune import playground
from sd3tune.records import ImageRecord

REST = 0.1
"""Seconds after an update in which the senders have the machine."""

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Slow(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.5)
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
print(server.server_port, flush=True)
server.serve_forever()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/hook"
    try:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), url, options.pairs)
    finally:
        server.kill()


def compare(folder: Path, url: str, pairs: int) -> None:
    data = folder / "datasets.yaml"
    data.write_text(f"- {{id: fluent, instance_data_dir: {playground.PICTURES / 'heldout'}, resolution: 64, crop: true}}\n")
    plain = st.presets.playground(
        output_dir=f"{folder}/run", cache_dir=f"{folder}/cache", validation_prompt=(), lr_scheduler="constant", max_train_steps=10_000
    )
    told = plain.replace(report_to="tensorboard", webhook_config={"callback_url": url})
    cache = st.CacheBuilder(st.plan(st.discover(data), plain), st.encoders(plain)).build()
    arms = {"plain": st.Trainer(plain, cache), "told": st.Trainer(told, cache)}
    picture = next((playground.PICTURES / "heldout").glob("*.png"))
    process: list[float] = []
    clock: list[float] = []
    taking: list[float] = []
    for pair in range(pairs + 5):
        found = {}
        for name in arms if pair % 2 else reversed(arms):
            found[name] = timed(arms[name], picture if pair % 10 == 0 else None)
        if pair >= 5:
            process.append(found["told"][0] / found["plain"][0])
            clock.append(found["told"][1] / found["plain"][1])
            taking.append(found["told"][2])
    for name, ratios in (("process time", process), ("clock", clock)):
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: median ratio {statistics.median(ratios):.4f} (quartiles {low:.3f} to {high:.3f}) over {len(ratios)} pairs")
    print(f"handing a record on: median {1e6 * statistics.median(taking):.0f} microseconds, longest {1e3 * max(taking):.1f} ms")
    arms["told"]._reporters.news()


def timed(trainer: st.Trainer, picture: Path | None) -> tuple[float, float, float]:
    """Process time and clock of an update with its senders' work, and how long it took to hand its record on."""
    used, clock = time.process_time(), time.perf_counter()
    record = trainer.step()
    if picture is not None:
        trainer._tell(
            ImageRecord(step=record.step, prompt="a pot", path=str(picture), seed=1, width=64, height=64, guidance=3.0, skip_layers=())
        )
    done = time.perf_counter() - clock
    time.sleep(REST)
    process = time.process_time() - used
    before = time.perf_counter()
    trainer._reporters.take(record)
    return process, done, time.perf_counter() - before


if __name__ == "__main__":
    main()
