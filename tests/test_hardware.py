"""What is promised of formats and threads: packed weights compute the same, and what is fastest is taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from torch import nn

from dalle_demo import hardware
from dalle_demo.config import PRESETS
from dalle_demo.models.packed import HalfEmbedding, PackedLinear, pack
from dalle_demo.models.transformer import ImageDecoder, TextEncoder, fill_up
from dalle_demo.sampling import filter_logits, guide

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SIZES = tiny_config().image_decoder


def half_linear(width_in: int, width_out: int) -> nn.Linear:
    """Projection with random weights that fp16 can hold."""
    linear = nn.Linear(width_in, width_out, bias=False)
    linear.weight.data = linear.weight.data.half().float()
    return linear.requires_grad_(False)


@pytest.mark.parametrize(("width_in", "width_out"), [(256, 768), (33, 47), (1024, 17)])
def test_packed_projection_computes_in_fp32(width_in, width_out):
    torch.manual_seed(0)
    linear, x = half_linear(width_in, width_out), torch.randn(2, 5, width_in)
    ours, exact = PackedLinear(linear)(x), x.double() @ linear.weight.double().T
    assert ours.shape == (2, 5, width_out)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 3e-6 * exact.abs().max()


def test_a_row_has_the_same_bits_in_every_batch_that_is_filled_up():
    torch.manual_seed(0)
    linear, x = PackedLinear(half_linear(256, 320)), torch.randn(64, 1, 256)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = torch.cat([linear(fill_up(row[None], linear.least_rows))[:1] for row in x])
        for rows in range(1, 65):
            filled = fill_up(x[:rows], linear.least_rows)
            assert torch.equal(linear(filled)[:rows], alone[:rows]), (threads, rows)


def test_packing_leaves_no_projection_and_keeps_embeddings_small():
    torch.manual_seed(0)
    decoder = ImageDecoder(SIZES).half().eval().requires_grad_(False)
    pack(decoder)
    kinds = [type(module) for module in decoder.modules()]
    assert nn.Linear not in kinds
    assert nn.Embedding not in kinds
    assert kinds.count(PackedLinear) == 7 * SIZES.layers + 1
    assert decoder.embed_tokens.weight.dtype == torch.float16
    assert isinstance(decoder.embed_tokens, HalfEmbedding)
    assert decoder.norm_final.weight.dtype == torch.float32


def test_packed_encoder_is_exact():
    torch.manual_seed(0)
    sizes = tiny_config().text_encoder
    plain = TextEncoder(sizes).half().float().eval().requires_grad_(False)
    packed = TextEncoder(sizes).eval().requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    hardware.place_transformer(packed, "float16", CPU)
    ids = torch.randint(4, 300, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(packed(ids, mask), plain(ids, mask), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("fastest", ["float32", "float16", "bfloat16"])
def test_takes_the_fastest_format(monkeypatch, fastest):
    monkeypatch.setattr(hardware, "has_native_bf16", lambda: True)
    original = hardware.seconds_per_step
    measured = lambda decoder, form, device: original(decoder, form, device) * 0 + (form != fastest)  # noqa: E731
    monkeypatch.setattr(hardware, "seconds_per_step", measured)
    assert hardware.fastest_format(SIZES, CPU) == fastest


def test_a_small_difference_changes_no_format(monkeypatch):
    monkeypatch.setattr(hardware, "can_pack", lambda: True)
    seconds = {"float16": 1.2, "float32": 1.0, "bfloat16": 1.1}
    monkeypatch.setattr(hardware, "has_native_bf16", lambda: True)
    monkeypatch.setattr(hardware, "seconds_per_step", lambda decoder, form, device: seconds[form])
    assert hardware.fastest_format(SIZES, CPU) == "float16"
    seconds["bfloat16"] = 0.5
    assert hardware.fastest_format(SIZES, CPU) == "bfloat16"


def test_without_bf16_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(hardware, "can_pack", lambda: True)
    monkeypatch.setattr(hardware, "has_native_bf16", lambda: False)
    monkeypatch.setattr(hardware, "seconds_per_step", lambda *_: pytest.fail("measured"))
    assert hardware.fastest_format(SIZES, CPU) == "float16"


def test_bf16_is_no_choice_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(hardware, "has_native_bf16", lambda: False)
    assert "bfloat16" not in hardware.formats(CPU)


def test_without_fbgemm_there_are_no_packed_weights(monkeypatch):
    monkeypatch.setattr(hardware, "can_pack", lambda: False)
    assert "float16" not in hardware.formats(CPU)
    with pytest.raises(ValueError, match="float32"):
        hardware.place_transformer(ImageDecoder(SIZES), "float16", CPU)


def test_a_graphics_card_computes_in_half_precision():
    card = torch.device("cuda")
    assert hardware.fastest_format(SIZES, card) == "float16"
    assert hardware.activation_type("float16", card) == torch.float16
    assert hardware.activation_type("float16", CPU) == torch.float32


def test_a_step_stays_on_its_device_and_in_its_type():
    """On the meta device, where any tensor made elsewhere is an error, as it would be on a graphics card."""
    meta = torch.device("meta")
    decoder = hardware.place_transformer(ImageDecoder(SIZES), "float16", meta)
    text = torch.zeros(2, 5, SIZES.text_width, dtype=torch.float16, device=meta)
    cache = decoder.prefill(text, torch.ones(2, 5, dtype=torch.bool, device=meta), 3)

    for position in range(3):
        logits = decoder.step(torch.zeros(6, dtype=torch.long, device=meta), position, cache)
        assert logits.shape == (6, SIZES.vocab_size)
        assert logits.device == meta
        assert logits.dtype == torch.float16
        assert filter_logits(guide(*logits.float().chunk(2), 3.0), 8, 0.9).device == meta


def test_names_the_devices_that_are_here():
    with pytest.raises(ValueError, match="cpu"):
        hardware.pick_device("cuda:0" if not torch.cuda.is_available() else "xpu")
    with pytest.raises(ValueError, match="warp"):
        hardware.pick_device("warp")
    assert hardware.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("capped", [{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, {"FBGEMM": "no"}])
def test_draws_on_lesser_processors(nano_folder, capped):
    """Instruction sets capped as on a laptop, and none of FBGEMM: pictures all the same."""
    program = f"""
from dalle_demo import DalleEngine, hardware
hardware.can_pack = (lambda: False) if {capped!r}.get("FBGEMM") else hardware.can_pack
engine = DalleEngine.load({str(nano_folder)!r})
(last,) = engine.generate(engine.params("a red apple", n=2, seed=3), previews=False)
assert len({{picture.tobytes() for picture in last.images}}) == 2
print(engine.format)
"""
    environment = os.environ | capped
    expected = {"float32"} if "FBGEMM" in capped else set(hardware.FORMATS)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in expected | ({"bfloat16"} if hardware.has_native_bf16() else set())


@pytest.mark.parametrize(("preset", "weights"), [("nano", 0.06), ("mini", 0.61), ("mega", 2.93)])
def test_estimates_the_memory_of_a_model(monkeypatch, preset, weights):
    """In GiB: fp16 Transformer and fp32 VQGAN, as published; and room for 16 guided pictures."""
    monkeypatch.setattr(hardware, "can_pack", lambda: True)
    sizes = PRESETS[preset].image_decoder
    assert hardware.weight_memory(PRESETS[preset]) / 2**30 == pytest.approx(weights, abs=0.01)
    cache = 32 * 2 * 4 * sizes.layers * sizes.length * sizes.width
    rest = hardware.memory_needed(PRESETS[preset]) - hardware.weight_memory(PRESETS[preset]) - cache
    assert 0.3 < rest / 2**30 < 1.1


def test_estimates_the_time_of_a_picture(monkeypatch):
    monkeypatch.setattr(hardware, "_speeds", lambda: (1e-10, 1e-11))
    seconds = hardware.seconds_per_image(PRESETS["mini"])
    weights = 235e6 * 1e-10 * 256
    pixels = 253e9 * 1e-11  # operations of the VQGAN's decoder, counted with another program
    rest = 256 * 12 * hardware.SECONDS_PER_LAYER
    assert seconds == pytest.approx(weights + pixels + rest, rel=0.02)


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(1, 0, "cuda"), (1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_picks_the_best_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert hardware.pick_device().type == expected


def test_takes_the_fastest_number_of_threads(monkeypatch):
    monkeypatch.setattr(hardware, "thread_counts", lambda: [1, 2])
    for fastest in (1, 2):
        timed = lambda *_, best=fastest: 1.0 if torch.get_num_threads() == best else 2.0  # noqa: E731
        monkeypatch.setattr(hardware, "seconds_per_step", timed)
        assert hardware.fastest_threads(None, "float32", CPU) == fastest


def test_thread_counts_end_at_the_cores_of_this_process(monkeypatch):
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])):
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert hardware.thread_counts() == expected
