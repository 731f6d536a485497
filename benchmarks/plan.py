"""Time and memory of discover, plan and its text for many pictures, cold and warm, each in a process of its own.

50 originals of 12 megapixels, hard links of them, a caption beside each.
python benchmarks/plan.py [--pictures 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WORK = """
import json, resource, sys, time
started = time.perf_counter()
import sd3tune as st
made = st.plan(st.discover(sys.argv[1]), st.presets.playground(aspect_bucket_alignment=64))
text = str(made)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": round(time.perf_counter() - started, 2), "cpu_s": round(time.process_time(), 2),
    "peak_MB": round(peak), "pictures": len(made.train), "torch": "torch" in sys.modules}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pictures"
        folder.mkdir()
        for n in range(50):
            noise = Image.effect_noise((1000, 750 + 5 * n), 60).resize((4000, 3000 + 20 * n))
            Image.merge("RGB", [noise] * 3).save(Path(root) / f"{n}.jpg", quality=90)
        for n in range(options.pictures):
            os.link(Path(root) / f"{n % 50}.jpg", folder / f"{n:05d}.jpg")
            (folder / f"{n:05d}.txt").write_text(f"picture number {n}\n")
            os.utime(folder / f"{n:05d}.jpg", (1e9, 1e9))
        size = sum(path.stat().st_size for path in Path(root).glob("*.jpg")) / 50e6
        print(json.dumps({"original_MB": round(size, 1)}))
        for name in ("cold", "warm", "warm again"):
            env = {**os.environ, "XDG_CACHE_HOME": str(Path(root) / "memory")}
            done = subprocess.run([sys.executable, "-c", WORK, str(folder)], env=env, capture_output=True, text=True, check=True)
            print(json.dumps({name: json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
