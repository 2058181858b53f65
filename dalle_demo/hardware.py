"""model -> the form in which this machine runs it fastest: device, number format and number of threads.

All that depends on the machine is here. A graphics card is taken when PyTorch sees one, otherwise the processor.
"""

import ctypes
import dataclasses
import math
import os
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_demo.config import MAX_IMAGES, DalleConfig, ImageDecoderConfig, TextEncoderConfig, VQGANConfig
from dalle_demo.models.packed import PackedLinear, can_pack, is_stored, pack, read
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN, fold_upsampling
from dalle_demo.models.winograd import use_winograd

FORMATS = ("float32", "float16", "bfloat16")  # of the Transformer's weights; on a processor float16 computes in fp32
MEASURED_STEPS = 6
MEASURED_ROWS = 8  # four guided pictures
MARGIN = 1.3
PROCESS = 350 * 2**20  # bytes that Python, PyTorch and the page take without a model
SECONDS_PER_LAYER = 4e-4  # of a decoding step, for what is no matrix product


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without one CUDA, else Apple's MPS, else the processor.

    Raises ValueError for a name that PyTorch does not know, or a device that it does not see.
    """
    if name is not None:
        seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if not seen.get(name.split(":")[0]):
            raise ValueError(f"device {name!r} is not here; there is {', '.join(kind for kind in seen if seen[kind])}")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def formats(device: torch.device) -> list[str]:
    """Formats that can pay on a device, those first that take less memory or are exact."""
    if device.type != "cpu":
        return ["float16"]
    available = {"float16": can_pack(), "bfloat16": has_native_bf16(), "float32": True}
    return [form for form in available if available[form]]


def has_native_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; elsewhere it is emulated and slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def activation_type(form: str, device: torch.device) -> torch.dtype:
    """Type of the Transformer's activations."""
    return torch.float32 if form == "float16" and device.type == "cpu" else getattr(torch, form)


def place_text_encoder(module: nn.Module, form: str, device: torch.device) -> nn.Module:
    """Bring a text encoder into a format, in place, and return it.

    On a processor, what is still in its file stays there: it is read once for each prompt (0.25 s for Mini), and takes
    no memory from the image decoder.
    """
    if device.type == "cpu" and is_stored(module):
        return module.to(activation_type(form, device))
    return place_transformer(module, form, device)


def place_transformer(module: nn.Module, form: str, device: torch.device) -> nn.Module:
    """Bring a Transformer into a format, in place, and return it; raises ValueError for a format that cannot be had."""
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is not one of {', '.join(FORMATS)}")
    if device.type == "cpu" and form == "float16":
        if not can_pack():
            raise ValueError("this processor cannot use weights in float16; leave the format out, or use float32")
        pack(module)
        return module
    read(module)
    return module.to(device, getattr(torch, form))


def place_vqgan(module: nn.Module, form: str, device: torch.device) -> nn.Module:
    """Bring a VQGAN or VAE, in place, into bf16 where the Transformer is in it and fp32 otherwise, and return it.

    Its activations overflow fp16.
    """
    fold_upsampling(module.decoder)
    module.to(device, pixel_type(form))
    if device.type == "cpu" and form != "bfloat16":
        use_winograd(module.decoder)
    return module


def pixel_type(form: str) -> torch.dtype:
    """Type of the VQGAN's activations."""
    return torch.bfloat16 if form == "bfloat16" else torch.float32


def give_back_memory() -> None:
    """Let the C library return what has been freed, where it can.

    glibc keeps 0.1 GiB of what loading Mini took, and 11 MB more at every step of training the VQGAN. (To have every
    large block mapped apart, its other remedy, makes a step of the image decoder half as slow again.)
    """
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def fastest_format(config: ImageDecoderConfig, device: torch.device) -> str:
    """Format with the shortest step of one layer of a decoder, whose weights are as large as the real ones.

    Small differences are noise on a busy machine, and another format is another picture: one must be faster by MARGIN
    to be taken before those that `formats` prefers.
    """
    choices = formats(device)
    if choices in (["float16"], ["float32"], ["float16", "float32"]):  # half the bytes and the same arithmetic
        return choices[0]
    small = dataclasses.replace(config, layers=1, vocab_size=min(config.vocab_size, 4096), bos=0)
    best, shortest = choices[0], math.inf
    for form in choices:
        seconds = seconds_per_step(place_transformer(_blank(small), form, device), form, device)
        if seconds < shortest / MARGIN:
            best, shortest = form, seconds
    return best


def _blank(config: ImageDecoderConfig) -> ImageDecoder:
    """Decoder with constant weights, which are made faster than random ones and multiplied as fast."""
    decoder = _meta(config).to_empty(device="cpu")
    for parameter in decoder.parameters():
        nn.init.constant_(parameter, 0.01)
    return decoder.eval().requires_grad_(False)


def fastest_threads(decoder: ImageDecoder, form: str, device: torch.device) -> int:
    """Number of threads with the shortest step right now: on a busy machine fewer are faster."""
    if device.type != "cpu":
        return torch.get_num_threads()
    return quickest_threads(lambda: seconds_per_step(decoder, form, device))


def quickest_threads(measure: Callable[[], float]) -> int:
    """Number of processor threads with which `measure` returns the least."""
    timings = {}
    for threads in thread_counts():
        torch.set_num_threads(threads)
        timings[threads] = measure()
    return min(timings, key=timings.get)


def memory_needed(config: DalleConfig) -> int:
    """Bytes that a process takes at most to load a model and draw with it on the processor, about."""
    sizes, vqgan = config.image_decoder, config.vqgan
    cache = MAX_IMAGES * 2 * 2 * sizes.layers * sizes.length * sizes.width  # keys and values, with guidance
    pixels = 8 * vqgan.drawing_channels * (vqgan.image_size // vqgan.patch) ** 2  # live feature maps
    largest = max(_sizes(config.text_encoder))  # of its weights, which are converted when read
    return weight_memory(config) + 4 * (cache + pixels + largest) + PROCESS


def weight_memory(config: DalleConfig) -> int:
    """Bytes of a loaded model's weights on the processor; those of a large text encoder stay in their file."""
    half = can_pack() or has_native_bf16()
    return sum(_sizes(config.image_decoder)) * (2 if half else 4) + sum(_sizes(config.vqgan)) * 4


def seconds_per_image(config: DalleConfig) -> float:
    """Seconds that one guided picture will take on this machine's processor, from two short measurements."""
    vqgan, sizes = _meta(config.vqgan), config.image_decoder
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        vqgan.decode(torch.empty(1, config.vqgan.codebook_dim, config.vqgan.grid, config.vqgan.grid))
    seconds_per_weight, seconds_per_flop = _speeds()
    step = sum(_sizes(sizes)) * seconds_per_weight + sizes.layers * SECONDS_PER_LAYER
    return sizes.length * step + counter.get_total_flops() * seconds_per_flop


@cache
def _speeds() -> tuple[float, float]:
    """Seconds of a decoding step per weight too many for the caches, and of a convolution per operation."""
    width, pixels = 4096, torch.ones(1, 64, 128, 128)
    with torch.inference_mode():
        linear = nn.Linear(width, 2 * width, bias=False, device="meta").to_empty(device="cpu")
        nn.init.constant_(linear.weight, 0.01)
        linear, rows = PackedLinear(linear) if can_pack() else linear, torch.ones(4, width)
        conv = nn.Conv2d(64, 64, 3, padding=1)
        flops = 2 * conv.weight.numel() * 128 * 128
        return seconds_of(lambda: linear(rows)) / (2 * width**2), seconds_of(lambda: conv(pixels)) / flops


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of the quickest of a few runs."""
    timings = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        run()
        timings.append(time.perf_counter() - start)
    return min(timings)


def _meta(config: ImageDecoderConfig | TextEncoderConfig | VQGANConfig) -> nn.Module:
    """Module without memory."""
    kinds = {ImageDecoderConfig: ImageDecoder, TextEncoderConfig: TextEncoder, VQGANConfig: VQGAN}
    with torch.device("meta"):
        return kinds[type(config)](config)


@cache
def _sizes(config: ImageDecoderConfig | TextEncoderConfig | VQGANConfig) -> list[int]:
    """Numbers of weights in each tensor of a module, which takes a while to build even without memory."""
    return [parameter.numel() for parameter in _meta(config).parameters()]


def thread_counts() -> list[int]:
    """Powers of two up to the cores that this process may use, and their number itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})


def seconds_per_step(decoder: ImageDecoder, form: str, device: torch.device) -> float:
    """Seconds of the quickest of a few decoding steps."""
    text = torch.zeros(1, 4, decoder.text_width, dtype=activation_type(form, device), device=device)
    cache = decoder.prefill(text, torch.ones(1, 4, dtype=torch.bool, device=device), MEASURED_ROWS)
    tokens, positions = torch.zeros(MEASURED_ROWS, dtype=torch.long, device=device), iter(range(decoder.length))
    return seconds_of(lambda: decoder.step(tokens, next(positions), cache).cpu())
