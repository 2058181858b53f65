"""Adapters change nothing until they are trained, merge into the weights that they stand beside, and can be dialled."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_config
from torch import nn

from dalle_demo import weights
from dalle_demo.checkpoints import StoredPart, WeightsError, load_part, save_tensors
from dalle_demo.config import PARTS
from dalle_demo.engines import DalleEngine
from dalle_demo.models.packed import is_stored
from dalle_demo.models.transformer import ImageDecoder
from dalle_demo.training import lora
from dalle_demo.weights import Dalle, load_dalle

CONFIG = tiny_config()


def trained(module: nn.Module, rank: int = 3) -> nn.Module:
    """The module with adapters that do something."""
    torch.manual_seed(3)
    lora.add(module, rank)
    for name, parameter in module.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.05)
    return module


def logits(decoder: nn.Module) -> torch.Tensor:
    torch.manual_seed(4)
    tokens, states = torch.randint(60, (2, CONFIG.image_decoder.length)), torch.randn(2, 5, 32)
    with torch.no_grad():
        return decoder(tokens, states, torch.ones(2, 5, dtype=torch.bool))


@pytest.fixture
def decoder(nano_folder) -> ImageDecoder:
    return load_part(nano_folder, "image_decoder")


@pytest.fixture
def tuned_folder(nano_folder, tmp_path) -> Path:
    """Checkpoint folder with merged adapters on both Transformers."""
    parts = {part: trained(load_part(nano_folder, part)) for part in ("text_encoder", "image_decoder")}
    states = {part: StoredPart(nano_folder / "model.safetensors", part) for part in PARTS}
    for part, module in parts.items():
        states[part] = {key: value.half() for key, value in lora.merged_state(module).items()}
    folder = tmp_path / "tuned"
    configs = {part: getattr(CONFIG, part) for part in PARTS}
    save_tensors(folder, configs, states, nano_folder / "tokenizer.json", defaults=CONFIG.defaults)
    lora.save(folder, parts, {})
    return folder


def matrices(model: Dalle) -> dict[str, torch.Tensor]:
    """Weights of every projection of both Transformers."""
    named = [
        (part, *pair) for part in ("text_encoder", "image_decoder") for pair in getattr(model, part).named_modules()
    ]
    return {f"{part}.{name}": child.weight.float() for part, name, child in named if isinstance(child, nn.Linear)}


def test_fresh_adapters_change_nothing(decoder):
    before = logits(decoder)
    lora.add(decoder, 4)
    assert torch.equal(logits(decoder), before)


def test_merged_equals_unmerged(decoder):
    base = logits(decoder)
    names = list(decoder.state_dict())
    with_adapters = logits(trained(decoder))
    merged = ImageDecoder(CONFIG.image_decoder)
    state = lora.merged_state(decoder)
    assert list(state) == names
    merged.load_state_dict(state)
    torch.testing.assert_close(logits(merged), with_adapters, rtol=1e-4, atol=1e-5)
    assert (with_adapters - base).abs().max() > 0.05


def test_only_adapters_are_trained_and_every_projection_has_one(decoder):
    projections = [name for name, child in decoder.named_modules() if isinstance(child, nn.Linear)]
    lora.add(decoder, 4)
    trainable = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(f"{name}.{factor}" for name in projections for factor in "AB")
    assert len(projections) == 7 * CONFIG.image_decoder.layers + 1
    for name, value in lora.adapters(decoder).items():
        assert value.shape["BA".index(name[-1]) - 1] == 4


def test_a_copy_shares_frozen_weights_only(decoder):
    lora.add(decoder, 4)
    frozen = {id(p): p for p in decoder.parameters() if not p.requires_grad}
    other = copy.deepcopy(decoder, frozen)
    assert other.lm_head.weight is decoder.lm_head.weight
    assert other.lm_head.A is not decoder.lm_head.A


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "in its file"])
def test_strength_goes_from_the_base_to_the_tuned_model(nano_folder, tuned_folder, monkeypatch, large):
    if large:
        monkeypatch.setattr(weights, "LARGE", 0)
    base, tuned = matrices(load_dalle(str(nano_folder))), matrices(load_dalle(str(tuned_folder)))
    for strength in (0, 0.5, 1, 1.5):
        loaded = load_dalle(str(tuned_folder))
        assert is_stored(loaded.image_decoder) is large
        model = lora.scale(loaded, tuned_folder, strength)
        assert (model.sha256 == loaded.sha256) is (strength == 1)
        for name, matrix in matrices(model).items():
            wanted = base[name] + strength * (tuned[name] - base[name])
            torch.testing.assert_close(matrix, wanted, rtol=2e-3, atol=5e-4)  # fp16
    assert max((tuned[name] - base[name]).abs().max() for name in base) > 0.03


def test_strength_zero_draws_as_the_base(nano_folder, tuned_folder):
    def probabilities(model: Dalle) -> torch.Tensor:
        return logits(model.image_decoder.float()).softmax(-1)

    base, tuned = (probabilities(load_dalle(str(folder))) for folder in (nano_folder, tuned_folder))
    off = probabilities(lora.scale(load_dalle(str(tuned_folder)), tuned_folder, 0))
    assert (off - base).abs().max() < 0.02 * (tuned - base).abs().max()
    model = lora.scale(load_dalle(str(tuned_folder)), tuned_folder, 0.7)
    engine = DalleEngine(model, form="float32", device="cpu")
    (last,) = engine.generate(engine.params("red box", n=1, seed=1), previews=False)
    assert last.images[0].size == (32, 32)
    assert (
        engine.origin["weights"] != load_dalle(str(tuned_folder)).sha256[:12]
    )  # --again must not take one for the other


def test_refuses_what_has_no_strength(nano_folder, tuned_folder, tmp_path):
    with pytest.raises(WeightsError, match="only what was trained as LoRA"):
        lora.scale(load_dalle(str(nano_folder)), nano_folder, 0.5)
    other = save_tiny(tmp_path / "other", tiny_config(vq_size=80, vq_dim=8, quantizer="vq", levels=()))
    (other / lora.FILE).write_bytes((tuned_folder / lora.FILE).read_bytes())
    with pytest.raises(WeightsError, match=r"lm_head.* does not fit other"):
        lora.scale(load_dalle(str(other)), other, 0.5)
    (other / lora.FILE).write_bytes((tuned_folder / lora.FILE).read_bytes()[:-9])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        lora.scale(load_dalle(str(other)), other, 0.5)
