"""preset -> seconds and memory of a picture, here and with min-dalle 0.4.11, on the same random weights.

Each program runs in a process of its own, from its files to its pixels: `latency.py --preset mini --against min-dalle`
starts them. The weights are made by random_weights.py; random ones cost what trained ones cost.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a cat on a wall"
TOKENS = 256
GUIDANCE, TOP_K = 10, 256
WARM_UPS, WARM_STEPS = 1, 2


def compare(preset: str, steps: int, rounds: int) -> dict:
    """Run both programs in turn, since machines change their pace, and put medians side by side.

    Args:
        steps: of min-dalle's 256; fewer are multiplied up, since a picture of its Mega takes minutes.
        rounds: processes of each program.
    """
    with tempfile.TemporaryDirectory(prefix="dalle_demo-bench-") as folder:
        raw, ours = Path(folder, "raw"), Path(folder, "ours")
        call("random_weights.py", "--preset", preset, "--out", raw)
        convert = [sys.executable, "-m", "dalle_demo", "weights", "convert", raw, "--form", "min-dalle"]
        subprocess.run([*map(str, convert), "--preset", preset, "--out", str(ours)], cwd=ROOT, check=True)
        call("random_weights.py", "--preset", preset, "--out", raw, "--arrange")
        counts = range(1, (os.cpu_count() or 1) + 1)
        by_threads = {count: measure("theirs", raw, preset, 16, count)["image_s"] for count in counts}
        best = min(by_threads, key=by_threads.get)
        pairs = [
            (measure("ours", ours, preset, TOKENS, 0), measure("theirs", raw, preset, steps, best))
            for _ in range(rounds)
        ]
        fidelity = measure("fidelity", ours, preset, TOKENS, 0)
    mine, theirs = (
        {key: middle([side[key] for side in sides]) for key in sides[0]} for sides in zip(*pairs, strict=True)
    )
    return {
        "preset": preset,
        "ours": mine | fidelity,
        "min_dalle": theirs,
        "min_dalle_image_s_by_threads_from_16_steps": by_threads,
        "image_s_by_round": [[ours["image_s"], other["image_s"]] for ours, other in pairs],
        "times_faster": round(middle([other["image_s"] / ours["image_s"] for ours, other in pairs]), 2),
        "share_of_its_memory": round(mine["peak_gib"] / theirs["peak_gib"], 3),
    }


def middle(values: list) -> float | str:
    """Median of numbers, or what all of them are."""
    return values[0] if isinstance(values[0], str) else round(statistics.median(values), 3)


def call(script: str, *arguments: object) -> str:
    """Standard output of another script of this folder."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(what: str, folder: Path, preset: str, steps: int, threads: int) -> dict:
    """Figures of one process of this script."""
    flags = ("--preset", preset, "--steps", steps, "--threads", threads)
    return json.loads(call("against.py", what, folder, *flags).splitlines()[-1])


def main() -> None:
    """Measure one side and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ours", "theirs", "fidelity"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--steps", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=0, help="0: as the program chooses")
    options = parser.parse_args()
    print(json.dumps({"ours": time_ours, "theirs": time_theirs, "fidelity": compare_formats}[options.what](options)))


def time_ours(options: argparse.Namespace) -> dict:
    """Whole pictures first, while memory is as small as it gets; then a step, and the speed of reading memory."""
    sys.path.insert(0, str(ROOT))
    import torch

    from dalle_demo import DalleEngine

    start = time.perf_counter()
    engine = DalleEngine.load(str(options.folder), threads=options.threads or None)
    load = time.perf_counter() - start
    params = engine.params(PROMPT, n=1, seed=1, top_k=TOP_K, guidance_scale=GUIDANCE)
    image = median(lambda: list(engine.generate(params, previews=False)), 1)
    peak = peak_gib()
    four = engine.params(PROMPT, n=4, seed=1, top_k=TOP_K, guidance_scale=GUIDANCE)
    grid = median(lambda: list(engine.generate(four, previews=False)), 1, warm_ups=0)
    with torch.inference_mode():
        text = engine._encode(PROMPT)
        step, token = engine._guided_step(text, GUIDANCE, 1), torch.zeros(1, dtype=torch.long)
        for position in range(100):
            step(token, position)
        times = iter(range(100, 200))
        step_s = median(lambda: step(token, next(times)), 60)
        weights = weight_bytes(engine.model.image_decoder)
        floor = weights / bandwidth(torch)
    return {
        "image_s": round(image, 2),
        "four_images_s": round(grid, 2),
        "load_s": round(load, 2),
        "peak_gib": round(peak, 3),
        "step_ms": round(1000 * step_s, 2),
        "weights_mib": round(weights / 2**20),
        "read_weights_once_ms": round(1000 * floor, 2),
        "step_over_reading": round(step_s / floor, 2),
        "format": engine.format,
        "threads": engine.threads,
    }


def weight_bytes(decoder) -> int:
    """Bytes of the weights that a step multiplies with, as they are in memory; keys of the text are made once."""
    from dalle_demo.models.packed import PackedLinear

    total = 0
    for name, module in decoder.named_modules():
        if name.endswith("cross_attention.kv"):
            continue
        if isinstance(module, PackedLinear):
            total += 2 * module.packed.unpack()[0].numel()
        elif type(module).__name__ == "Linear":
            total += module.weight.numel() * module.weight.element_size()
    return total


def bandwidth(torch) -> float:
    """Bytes a second at which a GiB of memory is read."""
    block = torch.ones(2**28)
    return 2**30 / min(median(block.sum, 1, warm_ups=0) for _ in range(7))


def compare_formats(options: argparse.Namespace) -> dict:
    """How far the chosen format is from fp32: of the next token's distribution, guided, along one random picture."""
    sys.path.insert(0, str(ROOT))
    import torch

    from dalle_demo import DalleEngine

    logits, tokens = {}, torch.randint(0, 16384, (TOKENS,), generator=torch.Generator().manual_seed(0))
    for form in (None, "float32"):
        engine = DalleEngine.load(str(options.folder), form=form)
        with torch.inference_mode():
            step = engine._guided_step(engine._encode(PROMPT), GUIDANCE, 1)
            rows = [step(token[None], position) for position, token in enumerate(tokens)]
        logits[form or "chosen"] = torch.cat(rows).double().log_softmax(-1)
        del engine, step
    exact, ours = logits["float32"], logits["chosen"]
    divergence = (exact.exp() * (exact - ours)).sum(-1)
    agreement = (exact.argmax(-1) == ours.argmax(-1)).double().mean()
    return {"kl_to_fp32_nats": float(f"{divergence.mean():.3g}"), "greedy_agreement": round(float(agreement), 4)}


def time_theirs(options: argparse.Namespace) -> dict:
    """The same with min-dalle's own class, loaded from files in its own layout."""
    import requests

    requests.get = lambda *_, **__: types.SimpleNamespace(content=b"")  # it counts downloads when it is constructed
    import torch
    from min_dalle import MinDalle

    mega = options.preset == "mega"
    model = MinDalle(str(options.folder), torch.float32, "cpu", is_mega=mega, is_reusable=True, is_verbose=False)
    torch.set_num_threads(options.threads)
    if options.steps == TOKENS:
        draw = lambda: model.generate_image(  # noqa: E731
            PROMPT, seed=1, grid_size=1, top_k=TOP_K, supercondition_factor=GUIDANCE
        )
        image = median(draw, 1)
    else:
        image = extrapolate(model, options.steps)
    return {"image_s": round(image, 2), "peak_gib": round(peak_gib(), 3), "threads": options.threads}


def extrapolate(model, steps: int) -> float:
    """Seconds of a picture of min-dalle's, from its first steps after some to warm up, and the rest of its work."""
    import torch

    class EnoughError(Exception):
        pass

    start, original, times = time.perf_counter(), model.decoder.sample_tokens, []

    def counted(**inputs):
        times.append(time.perf_counter())
        if len(times) > WARM_STEPS + steps:
            raise EnoughError
        return original(**inputs)

    model.decoder.sample_tokens = counted
    with contextlib.suppress(EnoughError):
        model.generate_image(PROMPT, seed=1, grid_size=1, top_k=TOP_K, supercondition_factor=GUIDANCE)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    pixels = median(lambda: model.detokenizer.forward(False, tokens), 1)
    return times[0] - start + (times[-1] - times[WARM_STEPS]) / steps * TOKENS + pixels


def median(run: Callable[[], object], runs: int, warm_ups: int = WARM_UPS) -> float:
    """Seconds of a call."""
    timings = []
    for _ in range(warm_ups + runs):
        start = time.perf_counter()
        run()
        timings.append(time.perf_counter() - start)
    return statistics.median(timings[warm_ups:])


def peak_gib() -> float:
    """Largest memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024  # of bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
