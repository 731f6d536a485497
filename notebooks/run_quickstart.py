"""Execute quickstart.ipynb with its progress in the terminal, and keep the executed notebook in the run's folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"


class Narrator(NotebookClient):  # type: ignore[misc]
    """Shows a cell's text and status lines while it runs."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        content = msg["content"]
        if msg["msg_type"] == "stream" and content["name"] == "stdout":
            sys.stdout.write("\r\033[K" + content["text"])
        elif msg["msg_type"] == "update_display_data":
            text = content["data"].get("text/markdown", "")
            sys.stdout.write("\r\033[K" + text if sys.stdout.isatty() else "")
        elif msg["msg_type"] == "execute_result" and "text/html" in content["data"]:
            sys.stdout.write(content["data"]["text/plain"] + "\n")
        sys.stdout.flush()
        return super().process_message(msg, cell, cell_index)


def main() -> int:
    started, before = time.monotonic(), set(RUNS.glob("quickstart*"))
    notebook = nbformat.read(HERE / "quickstart.ipynb", as_version=4)
    try:
        Narrator(notebook, timeout=3600, resources={"metadata": {"path": str(HERE)}}).execute()
    except CellExecutionError as error:
        sys.stdout.write(f"\n{error.ename}: {error.evalue}\n")
        return 1
    (run,) = sorted(set(RUNS.glob("quickstart*")) - before)
    executed = run / "quickstart.ipynb"
    nbformat.write(notebook, executed)
    manifest = json.loads((run / "manifest.json").read_text())
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in history if row["type"] == "eval"]
    images = next(row["images"] for row in history if row["type"] == "eval")
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(
        f"\ntrained:  {manifest['trainable_parameters']:,} parameters on {manifest['images_used']} pictures, in {minutes:.1f} min in all\n"
        f"held out: loss on {images} pictures {losses[0]:.4f} before, {losses[-1]:.4f} after ({losses[-1] / losses[0] - 1:+.0%})\n"
        f"grid:     {run / 'grid.png'}\n"
        f"LoRA:     {run / 'lora.safetensors'}\n"
        f"open it:  .venv/bin/jupyter lab {executed}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
