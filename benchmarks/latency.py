"""preset -> seconds: how long the page takes to come up, and a grid of four pictures to be drawn in it.

Every figure is taken end to end: `python app.py` is started as a process of its own and asked by Gradio's client,
as a browser would. The engine alone is timed beside it. Run it on an idle machine:

    python benchmarks/latency.py --preset nano
    python benchmarks/latency.py --preset mini --against min-dalle
    python benchmarks/latency.py --preset mega --against min-dalle --steps 16 --rounds 1

The last line is JSON.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT = "a red apple"
STARTS, RUNS, WARM_UPS = 3, 10, 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="preset, or folder with weights")
    parser.add_argument("--n", type=int, default=4, help="pictures a request")
    parser.add_argument("--against", choices=["min-dalle"], help="mini or mega: compare with it on random weights")
    parser.add_argument("--steps", type=int, default=256, help="--against: its steps to time; fewer are multiplied up")
    parser.add_argument("--rounds", type=int, default=3, help="--against: processes of each program, in turn")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if options.against:
        from against import compare  # which needs a Unix

        finish(compare(options.preset, options.steps, options.rounds), options.out)
        return
    engine = time_engine(options.preset, options.n)
    starts, grids, previews = [], [], []
    for _ in range(STARTS):
        start, timings = time_page(options.preset, options.n)
        starts.append(start)
        previews += [preview for preview, _ in timings]
        grids += [total for _, total in timings]
    figures = {
        "preset": options.preset,
        "n": options.n,
        "page_served_s": summary(starts),
        "page_first_preview_s": summary(previews),
        "page_grid_s": summary(grids),
        **engine,
    }
    finish(figures, options.out)


def finish(figures: dict, out: Path | None) -> None:
    """Name the machine, print the figures and keep them."""
    figures |= {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()}
    for name, value in figures.items():
        print(f"{name:30s} {value}")
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and worst."""
    return {"median": round(statistics.median(seconds), 3), "worst": round(max(seconds), 3)}


def time_engine(preset: str, n: int) -> dict:
    """First preview and whole request of the engine in this process, and the settings that it chose."""
    import torch

    from dalle_demo import DalleEngine

    engine = DalleEngine.load(preset)
    previews, totals = [], []
    for run in range(WARM_UPS + RUNS):
        start = time.perf_counter()
        first = None
        for _ in engine.generate(engine.params(PROMPT, n=n, seed=run)):
            first = first or time.perf_counter() - start
        if run >= WARM_UPS:
            previews.append(first)
            totals.append(time.perf_counter() - start)
    return {
        "engine_first_preview_s": summary(previews),
        "engine_grid_s": summary(totals),
        "threads": engine.threads,
        "format": engine.format,
        "torch": torch.__version__,
    }


def time_page(preset: str, n: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds until a fresh process serves its page, then (first preview, whole grid) of requests to it."""
    from gradio_client import Client

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(ROOT / "app.py"), "--weights", preset, "--port", str(port)]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        wait_for(url, server)
        served = time.perf_counter() - start
        client = Client(url, verbose=False)
        timings = [time_request(client, n, run) for run in range(WARM_UPS + RUNS)]
    finally:
        server.terminate()
        server.wait()
    return served, timings[WARM_UPS:]


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Return when the page is served."""
    while True:
        if server.poll() is not None:
            raise SystemExit(f"app.py ended with status {server.returncode}")
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)


def time_request(client, n: int, seed: int) -> tuple[float, float]:
    """Seconds to the first update that carries pictures and to the last one."""
    start = time.perf_counter()
    first = None
    job = client.submit(prompt=PROMPT, n=n, seed=seed, api_name="/generate")
    for update in job:
        if first is None and update[0]:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start


def processor() -> str:
    """Model name of the processor, and what PyTorch uses of it, since virtual machines hide the generation."""
    import torch

    from dalle_demo.hardware import has_native_bf16

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{' with bf16' if has_native_bf16() else ''}"


if __name__ == "__main__":
    main()
