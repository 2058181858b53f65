"""Training goes on where it was broken off, to the bit; makes the same data in any number of processes; and learns."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import save_tiny, tiny_config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from train_tiny import BATCH, make_plan, make_stage

from dalle_demo.checkpoints import load_part, load_tokenizer
from dalle_demo.engines import DalleEngine
from dalle_demo.training import caches, loop, stages
from dalle_demo.training.loop import Plan, Workers, make_optimizers, schedule, train, update_ema
from dalle_demo.training.losses import (
    PerceptualLoss,
    adaptive_weight,
    contrastive_loss,
    discriminator_loss,
    distillation_loss,
    flow_matching_loss,
    generator_loss,
    kl_divergence,
    minimax_loss,
    token_loss,
    token_losses,
)

DRIVER = Path(__file__).with_name("train_tiny.py")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stage_of(data_folder, nano_folder):
    """Maker of makers: name, out -> what `train` takes."""
    return lambda name, out, trace=None: make_stage(name, data_folder, out, nano_folder, trace)


def read_log(out: Path, key: str = "loss") -> list[dict]:
    """Lines of the log that hold a figure."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimizers and logged losses are equal to the bit."""
    first, second = checkpoint(one), checkpoint(other)
    assert first["step"] == second["step"]
    for part in ("network", "ema"):
        assert list(first[part]) == list(second[part])
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), f"{part}: {key}"
    for ours, theirs in zip(first["optimizers"], second["optimizers"], strict=True):
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys() != set()
        for index, state in ours["state"].items():
            for key, value in state.items():
                assert torch.equal(value, theirs["state"][index][key])
    clocks = {"seconds", "images_per_second"}
    logs = [[{k: v for k, v in line.items() if k not in clocks} for line in read_log(out)] for out in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "weights/model.safetensors").read_bytes() == (other / "weights/model.safetensors").read_bytes()


# schedule, average, optimizer, losses


def test_schedule_warms_up_and_ends_at_zero():
    assert schedule(0, 100, 0.0) == pytest.approx(0.01)
    assert schedule(99, 100, 0.0) == pytest.approx(1)
    assert schedule(5000, 100, 0.5) == pytest.approx(0.5)
    assert schedule(5000, 100, 1.0) == pytest.approx(0)
    rates = [schedule(step, 10, step / 100) for step in range(100)]
    assert rates[:9] == sorted(rates[:9])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_average_starts_as_a_copy_and_follows_over_a_twentieth():
    network, ema = nn.Linear(1, 1), nn.Linear(1, 1)
    network.requires_grad_(False)
    ema.requires_grad_(False)
    for step in range(1, 3001):
        network.weight.fill_(step)
        update_ema(ema, network, step)
        if step == 1:
            assert torch.equal(ema.weight, network.weight)
    # weights that grow like t average to t (gamma + 1) / (gamma + 2), that is they lag by a twentieth of the run
    assert ema.weight.item() / 3000 == pytest.approx(17.97 / 18.97, rel=1e-3)


def test_memory_is_given_back_at_every_line_of_the_log(stage_of, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    monkeypatch.setattr(loop, "give_back_memory", lambda: given.append(1))
    train(stage_of("text", tmp_path), make_plan(7), tmp_path)
    assert len(given) == 2


def test_average_of_a_constant_is_the_constant():
    network, ema = nn.Linear(3, 3), nn.Linear(3, 3)
    for step in range(1, 50):
        update_ema(ema.requires_grad_(False), network.requires_grad_(False), step)
    torch.testing.assert_close(ema.weight, network.weight)


def test_only_matrices_decay():
    network = stages.VQGAN(tiny_config().vqgan)
    network.encoder.requires_grad_(False)
    [optimizer] = make_optimizers(network, 1e-3, (0.9, 0.95))  # without Transformer layers there is nothing for Muon
    decaying, free = optimizer.param_groups
    assert decaying["weight_decay"] > 0
    assert free["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in decaying["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    count = sum(len(group["params"]) for group in (decaying, free))
    assert count == len([parameter for parameter in network.parameters() if parameter.requires_grad])


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(stage_of, tmp_path, alone):
    network = stage_of("dalle", tmp_path)(alone).network
    network.image_decoder.layers[0].requires_grad_(False)
    names = {parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad}
    adamw, muon = make_optimizers(network, 1e-3, (0.9, 0.95))
    [group] = muon.param_groups
    taken = [names[parameter] for parameter in group["params"]]
    kinds = {name.split(".", 3)[3] for name in taken if name.startswith("image_decoder.layers.1.")}
    attention = {f"self_attention.{name}.weight" for name in ("qkv", "out")}
    attention |= {f"cross_attention.{name}.weight" for name in ("q", "kv", "out")}
    assert kinds == attention | {"feed_forward.gate_and_value.weight", "feed_forward.out.weight"}
    assert len(taken) == 7 + 2 * 4  # one decoder layer that is not frozen, two encoder layers
    assert group["weight_decay"] > 0
    others = [names[parameter] for one in adamw.param_groups for parameter in one["params"]]
    assert {"image_decoder.lm_head.weight", "image_decoder.embed_tokens.weight"} <= set(others)
    assert sorted(taken + others) == sorted(names.values())


def test_every_optimizer_follows_the_schedule(stage_of, tmp_path):
    train(stage_of("dalle", tmp_path), make_plan(20), tmp_path)
    rates = {group["lr"] for one in checkpoint(tmp_path)["optimizers"] for group in one["param_groups"]}
    assert rates == {make_plan(20).learning_rate * schedule(19, 5, 19 / 20)}


@pytest.mark.parametrize("settings", [{}, {"steps": 1, "minutes": 1.0}])
def test_a_plan_has_one_end(settings):
    with pytest.raises(ValueError, match="--steps or --minutes"):
        Plan(4, 1e-3, **settings)


def test_token_loss_is_in_nats_a_token():
    logits = torch.zeros(2, 3, 10)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert token_loss(logits, tokens).item() == pytest.approx(math.log(10))
    logits[0, 1, 2] = 5.0
    expected = -logits.log_softmax(-1).gather(2, tokens[:, :, None]).mean()
    assert token_loss(logits, tokens).item() == pytest.approx(expected.item())
    certain = F.one_hot(tokens, 10).float()
    assert torch.equal(token_losses(logits, certain), token_losses(logits, tokens))


def test_the_token_loss_of_bf16_logits_is_not_copied_to_fp32_but_added_up_in_it():
    torch.manual_seed(0)
    logits = torch.randn(4, 64, 500).bfloat16().requires_grad_()
    tokens = torch.randint(500, (4, 64))
    saved = []
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        loss = token_loss(logits, tokens)
    assert loss.dtype == torch.float32
    assert torch.float32 not in saved
    assert loss.item() == pytest.approx(token_loss(logits.float(), tokens).item(), rel=1e-3)


def test_distillation_loss_is_one_minus_the_cosine():
    a = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [-2.0, -2.0]])
    assert distillation_loss(a, b).item() == pytest.approx((0 + 2) / 2)


def test_perceptual_loss_sees_differences_and_is_not_trained():
    loss = PerceptualLoss(64)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not loss.training
    ours = torch.rand(2, 3, 80, 80) * 2 - 1
    real = ours.clone()
    assert loss(ours, real, 8, 8).item() == pytest.approx(0, abs=1e-6)
    real[:, :, :4, :4] += 0.5  # outside the crop
    assert loss(ours, real, 16, 16).item() == pytest.approx(0, abs=1e-6)
    ours.requires_grad_(True)
    value = loss(ours, -real, 16, 16)
    value.backward()
    assert value.item() > 0.01
    assert ours.grad[:, :, 16:, 16:].abs().sum() > 0
    assert ours.grad[:, :, :16].abs().sum() == 0


# data


def test_each_pass_over_the_data_is_another_permutation():
    indices = np.array([3, 5, 7, 11, 13])
    passes = [stages.shuffled(indices, 0, range(5 * i, 5 * i + 5)).tolist() for i in range(4)]
    assert all(sorted(one) == indices.tolist() for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert stages.shuffled(indices, 0, range(3, 8)).tolist() == passes[0][3:] + passes[1][:3]
    assert stages.shuffled(indices, 1, range(20)).tolist() != stages.shuffled(indices, 0, range(20)).tolist()


@pytest.mark.parametrize("name", ["vqgan", "sharpen", "dalle"])
def test_samples_do_not_depend_on_how_they_are_grouped(stage_of, tmp_path, name, alone):
    stage = stage_of(name, tmp_path)(alone)
    torch.manual_seed(1)
    whole = stage.batch(range(8, 16))
    torch.manual_seed(2)  # global state decides nothing
    np.random.seed(2)  # noqa: NPY002
    parts = [stage.batch(range(8 + i, 8 + i + 2)) for i in (0, 2, 4, 6)]
    for key, value in whole.items():
        if isinstance(value, torch.Tensor) and key != "text_ids":
            assert torch.equal(torch.cat([part[key] for part in parts]), value), key
    assert stage.batch(range(16, 24)).keys() == whole.keys()
    first = "image_tokens" if name == "dalle" else "pixels"
    assert not torch.equal(stage.batch(range(16, 24))[first], whole[first])


def test_sharpening_changes_pictures_and_no_token(stage_of, tmp_path, nano_folder, alone):
    train(stage_of("sharpen", tmp_path), make_plan(10), tmp_path)
    before, after = load_part(nano_folder, "vqgan"), load_part(tmp_path / "weights", "vqgan")
    pixels = stage_of("sharpen", tmp_path)(alone).batch(range(4))["pixels"]
    with torch.no_grad():
        assert torch.equal(before.encode(pixels), after.encode(pixels))
        assert not torch.equal(before(pixels)[0], after(pixels)[0])


@pytest.mark.parametrize("name", ["vqgan", "sharpen"])
def test_a_vqgan_sees_drawings_as_they_are_scenes_and_others(stage_of, tmp_path, name, alone, monkeypatch):
    stage, samples = stage_of(name, tmp_path)(alone), range(200)
    drawn, draw = [], stage.scenes.draw
    monkeypatch.setattr(stage.scenes, "draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    pixels = stage.batch(samples)["pixels"]
    plain = stages.plain_render(stage.pairs, stages.shuffled(stage.training, stage.seed, samples), pixels.shape[-1])
    same = (pixels - plain).abs().amax((1, 2, 3)) < 1e-5
    assert 40 < same.sum() < 80  # three tenths
    assert 25 < len(drawn) < 55  # two tenths


def test_a_vqgan_begins_from_one_of_fewer_codes(data_folder, nano_folder):
    """Its encoder, and the digits that it had; what has no counterpart is new."""
    config = tiny_config(levels=(5, 4, 3, 4), decoder_channels=32).vqgan
    fresh = stages.VQGANStage(data_folder, config).network.vqgan.state_dict()
    begun = stages.VQGANStage(data_folder, config, earlier=nano_folder).network.vqgan
    before, after = load_part(nano_folder, "vqgan"), begun.state_dict()
    assert_equal_states(begun.encoder, before.encoder)
    assert torch.equal(begun.quant_conv.weight[:3], before.quant_conv.weight)
    same = [name for name in after if torch.equal(after[name], fresh[name]) and after[name].unique().numel() > 1]
    assert "decoder.conv_in.weight" in same
    assert not any(name.startswith("encoder") for name in same)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(begun.encode(pixels) % 60, before.encode(pixels))
        assert begun.encode(pixels).max() < 240


def test_each_player_learns_from_its_own_loss_alone(stage_of, tmp_path, alone):
    stage = stage_of("sharpen", tmp_path)(alone)
    network, batch = stage.network, stage.batch(range(4))
    losses = network(**batch)
    (losses["loss"] - losses["discriminator"]).backward(retain_graph=True)
    assert not any(p.grad.any() for p in network.discriminator.parameters())
    decoder = list(network.vqgan.decoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in decoder if p.ndim > 1)
    network.zero_grad()
    losses["discriminator"].backward()
    assert all(p.grad is None for p in decoder)
    assert all(p.grad.abs().sum() > 0 for p in network.discriminator.parameters() if p.ndim > 1)


def test_hinge_losses():
    real, ours = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, ours).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)
    assert generator_loss(ours).item() == 1.5


def test_minimax_loss_is_of_two_probabilities():
    """As equation 1 of Goodfellow et al. has it, and without overflow where a score is sure."""
    real, ours = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([0.5, -3.0])
    expected = sum(math.log(1 / (1 + math.exp(-score))) for score in real.tolist()) / 3
    expected += sum(math.log(1 - 1 / (1 + math.exp(-score))) for score in ours.tolist()) / 2
    assert minimax_loss(real, ours).item() == pytest.approx(expected)
    assert minimax_loss(torch.tensor([500.0]), torch.tensor([500.0])).item() == pytest.approx(-500)


def test_kl_divergence_is_that_of_normal_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    ours = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(ours, prior).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0, 0]


def test_contrastive_loss_is_the_mean_surprise_both_ways():
    generator = torch.Generator().manual_seed(0)
    text, image = (nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=-1) for _ in range(2))
    scale, total = 7.0, 0.0
    for i in range(4):
        likeness = [math.exp(scale * sum(a * b for a, b in zip(text[i], image[j], strict=True))) for j in range(4)]
        reverse = [math.exp(scale * sum(a * b for a, b in zip(text[j], image[i], strict=True))) for j in range(4)]
        total -= math.log(likeness[i] / sum(likeness)) + math.log(reverse[i] / sum(reverse))
    found = contrastive_loss(text, image, torch.tensor(scale))
    assert found.item() == pytest.approx(total / 8, rel=1e-5)
    assert contrastive_loss(text, text, torch.tensor(100.0)) < 0.01
    assert contrastive_loss(text, text.flip(0), torch.tensor(100.0)) > 1


def test_flow_matching_loss_wants_the_velocity_of_the_straight_path():
    start, end = torch.randn(3, 5), torch.randn(3, 5)
    times = torch.tensor([0.25, 0.5])
    points = [start + time * (end - start) for time in times]
    velocity = (points[1] - points[0]) / (times[1] - times[0])
    assert flow_matching_loss(velocity, start, end).item() == pytest.approx(0, abs=1e-10)
    assert flow_matching_loss(velocity + 2, start, end).item() == pytest.approx(4)


def test_adaptive_weight_makes_both_pull_alike():
    output = torch.randn(5, requires_grad=True)
    anchor, adversary = 3 * output.sum(), 0.5 * (2 * output).sum()
    assert adaptive_weight(anchor, 5 * adversary, output).item() == pytest.approx(0.6)
    assert adaptive_weight(anchor, 0 * output.sum(), output).item() == 1


def test_vqgan_samples_are_pictures_in_range(stage_of, tmp_path, alone):
    stage = stage_of("vqgan", tmp_path)(alone)
    pixels = stage.batch(range(32))["pixels"]
    assert pixels.shape == (32, 3, 32, 32)
    assert -1.01 < pixels.min() < pixels.max() < 1.01
    corners = pixels[:, :, 0, 0]
    white = (corners > 0.99).all(1)
    assert 4 < white.sum() < 28  # white and coloured backgrounds


def test_dalle_samples_drop_captions_and_disturb_inputs(stage_of, tmp_path, alone):
    stage = stage_of("dalle", tmp_path)(alone)
    batch = stage.batch(range(400))
    empty = (batch["text_ids"] != 1).sum(1) == 2  # only <s> </s>
    assert 0.05 < empty.float().mean() < 0.16
    shares = (batch["inputs"] != batch["image_tokens"]).float().mean(1)  # of each sample
    assert 0.3 < shares.mean() < 0.55  # half of NEARBY + ANYWHERE, less the digits at their ends
    assert shares.min() < 0.1
    assert shares.max() > 0.7
    assert batch["image_tokens"].max() < stage.config.vqgan.codebook_size
    assert batch["inputs"].max() < stage.config.vqgan.codebook_size


def test_dalle_never_trains_on_held_out_drawings(stage_of, tmp_path, alone):
    stage = stage_of("dalle", tmp_path)(alone)
    seen = set(stages.shuffled(stage.training, 0, range(500)).tolist())
    assert len(stage.held_out)
    assert not seen & set(stage.held_out.tolist())
    assert len(seen) + len(stage.held_out) == len(stage.pairs)


def test_dalle_targets_are_tokens_of_drawings_and_of_scenes(stage_of, tmp_path, monkeypatch, alone):
    stage = stage_of("dalle", tmp_path)(alone)
    pixels = stages.plain_render(stage.pairs, np.arange(5), 32)
    assert np.array_equal(stage.vqgan.encode(pixels).numpy(), stage.tokens[:5])
    assert stage.tokens.shape == (24, 16)
    plain = {tuple(row) for row in stage.tokens.tolist()}
    share = np.mean([tuple(row) in plain for row in stage.batch(range(200))["image_tokens"].tolist()])
    assert 0.2 < share < 0.4  # half of those that are no scenes
    monkeypatch.setattr(stages, "SCENE_SHARE", 1.0)
    rng = stages.sample_rng(7, 1)
    rng.random()  # whether it is a scene
    tokens = stage.vqgan.encode(stages.resize(stage.scenes.render([stage.scenes.draw(3, rng)]), 32))
    assert np.array_equal(tokens[0].numpy(), stage._sample(stages.sample_rng(7, 1), 3)[1])


def test_moved_drawings_stay_whole_and_only_those_that_may_are_mirrored(stage_of, tmp_path, monkeypatch, alone):
    stage, shown = stage_of("dalle", tmp_path)(alone), []
    monkeypatch.setattr(stages, "MOVED_SHARE", 1.0)
    monkeypatch.setattr(stage, "_encode", lambda pixels: shown.append(pixels) or np.zeros((1, 16), np.int32))
    box = np.zeros((1, 128, 128, 4), np.uint8)
    box[0, 30:100, 30:60] = (255, 0, 0, 255)
    box[0, 30:100, 60:90] = (0, 0, 255, 255)
    monkeypatch.setattr(type(stage.pairs), "pictures", lambda self, indices: torch.from_numpy(box))
    for group, mirrored in (("objects", 0), ("animals-nature", 12)):
        monkeypatch.setitem(stage.pairs.rows[0], "group", group)
        shown.clear()
        for number in range(24):
            stage._drawing(0, np.random.default_rng(number))
        area = torch.stack([(pixels[0].amin(0) < 0.9).float().mean() for pixels in shown])
        assert 0.68 * area.max() < area.min() < 0.9 * area.max()  # zoomed to 85 % and more, and none cut off
        assert area.max() < 60 * 70 / 128**2 * 1.05
        lefts = [pixels[0, 0, 64, :64].mean() > pixels[0, 0, 64, 64:].mean() for pixels in shown]
        assert abs(24 - sum(map(int, lefts)) - mirrored) <= 5 * (mirrored > 0)


def test_dalle_goes_on_with_a_decoder_and_can_leave_the_text_encoder(data_folder, nano_folder, tmp_path, alone):
    def make(workers):
        return stages.DalleStage(
            data_folder,
            tiny_config(),
            nano_folder,
            nano_folder,
            tmp_path,
            workers,
            decoder=nano_folder,
            freeze_text=True,
        )

    before = {part: load_part(nano_folder, part) for part in ("text_encoder", "image_decoder")}
    begun = make(alone)
    assert_equal_states(begun.network.image_decoder, before["image_decoder"])
    train(make, make_plan(3), tmp_path)
    after = {part: load_part(tmp_path / "weights", part) for part in before}
    assert_equal_states(after["text_encoder"], before["text_encoder"])
    assert not torch.equal(after["image_decoder"].lm_head.weight, before["image_decoder"].lm_head.weight)


def test_a_run_goes_on_with_what_it_was_begun_with(data_folder, nano_folder, tmp_path):
    """A frozen text encoder stays so, and the VQGAN that one was begun from is the same."""
    folders, config = (data_folder, tiny_config(), nano_folder, nano_folder, tmp_path / "dalle"), tiny_config().vqgan

    def dalle(freeze):
        train(lambda workers: stages.DalleStage(*folders, workers, freeze_text=freeze), make_plan(1), folders[-1], True)

    def vqgan(earlier):
        out = tmp_path / "vqgan"
        train(lambda workers: stages.VQGANStage(data_folder, config, earlier=earlier), make_plan(1), out, True)

    for run, first, other, flag in [(dalle, True, False, "--freeze-text"), (vqgan, nano_folder, None, "--earlier")]:
        run(first)
        run(first)
        with pytest.raises(ValueError, match=f"another {flag}"):
            run(other)


def test_a_run_goes_on_with_its_batch(stage_of, tmp_path):
    """Of which its samples are counted."""
    train(stage_of("text", tmp_path), make_plan(2), tmp_path)
    with pytest.raises(ValueError, match="another --batch"):
        train(stage_of("text", tmp_path), dataclasses.replace(make_plan(4), batch=2 * BATCH), tmp_path, True)


def test_a_decoder_of_fewer_codes_goes_on_with_more(nano_folder):
    """A token is as likely as the one that it was, spread over the digits that are new."""
    before, config = load_part(nano_folder, "image_decoder"), tiny_config(levels=(5, 4, 3, 4))
    after = stages.continued(nano_folder, config)
    tokens = torch.randint(240, (2, 16), generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 5, before.text_width, generator=torch.Generator().manual_seed(2)), torch.ones(2, 5).bool()
    with torch.no_grad():
        known, new = before(tokens % 60, *text), after(tokens, *text)
    assert new.shape == (2, 16, 241)
    torch.testing.assert_close(new[..., :240].unflatten(-1, (4, 60)), known[..., None, :60].expand(-1, -1, 4, -1))
    torch.testing.assert_close(new[..., 240:], known[..., 60:])
    assert_equal_states(stages.continued(nano_folder, tiny_config()), before)


def test_an_image_decoder_of_fewer_codes_is_trained_on(data_folder, nano_folder, tmp_path, alone):
    config = tiny_config(levels=(5, 4, 3, 4), decoder_channels=32)
    save_tiny(tmp_path / "wide", config)
    folders = tmp_path / "wide", nano_folder, tmp_path / "run"

    def make(workers):
        return stages.DalleStage(data_folder, config, *folders, workers, decoder=nano_folder)

    train(make, make_plan(2), folders[-1])
    trained = load_part(folders[-1] / "weights", "image_decoder")
    assert trained.bos == 240
    assert trained.lm_head.weight.shape == (241, 48)
    assert len(trained.lm_head.weight.unique(dim=0)) > 61


@pytest.mark.parametrize("levels", [(5, 3, 4, 4), (6, 4, 3), (5, 4), (4, 5, 3)])
def test_a_decoder_whose_codes_are_others_is_refused(nano_folder, levels):
    with pytest.raises(ValueError, match="holds an image_decoder of other sizes than --preset"):
        stages.continued(nano_folder, tiny_config(levels=levels))


def assert_equal_states(one, other):
    """Two modules have the same weights."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_neighbours_differ_by_one_step_in_one_digit():
    levels = (5, 4, 3)
    tokens = np.arange(60)
    found = set()
    for seed in range(30):
        moved = stages.neighbours(tokens, levels, np.random.default_rng(seed))
        steps = np.abs(digits(moved, levels) - digits(tokens, levels))
        assert steps.sum(0).max() == 1
        assert 0 <= moved.min() <= moved.max() < 60
        found |= set(steps.argmax(0)[steps.sum(0) == 1])
    assert found == {0, 1, 2}


def digits(tokens: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """FSQ digits, a row for each dimension."""
    return np.stack(np.unravel_index(tokens, levels[::-1])[::-1])


def test_vq_tokens_are_replaced_by_any(stage_of, tmp_path):
    config = tiny_config(quantizer="vq", levels=(), vq_size=40, vq_dim=8).vqgan
    changed = stages.disturb(np.zeros(4000, np.int64), config, np.random.default_rng(0))
    assert set(changed) == set(range(40))


def test_cache_is_computed_once_and_only_kept_whole(tmp_path, alone):
    path = tmp_path / "numbers.npy"
    with pytest.raises(ZeroDivisionError):
        caches.shared_cache(path, 5, lambda rows: 1 / 0, alone)
    assert not path.exists()
    first = caches.shared_cache(path, 5, lambda rows: np.array(rows) * 2, alone)
    again = caches.shared_cache(path, 5, lambda rows: pytest.fail("computed twice"), alone)
    assert first.tolist() == again.tolist() == [0, 2, 4, 6, 8]
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.npy"]


# whole runs


@pytest.mark.parametrize("name", ["vqgan", "dalle"])
def test_loss_goes_down_and_weights_come_out(stage_of, tmp_path, name, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    train(stage_of(name, tmp_path), make_plan(60), tmp_path)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert [line["step"] for line in read_log(tmp_path)] == list(range(2, 61, 2))
    if name == "vqgan":
        assert load_part(tmp_path / "weights", "vqgan").encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
        assert read_log(tmp_path, "validation_psnr")[-1]["validation_code_perplexity"] >= 1
    else:
        assert read_log(tmp_path, "validation_loss")[-1]["validation_loss"] > 0
        engine = DalleEngine.load(str(tmp_path / "weights"))
        *_, last = engine.generate(engine.params("red box", n=1, seed=1))
        assert last.images[0].size == (32, 32)


def test_exports_the_average_and_not_the_last_weights(stage_of, tmp_path):
    train(stage_of("vqgan", tmp_path), make_plan(6), tmp_path)
    exported = load_part(tmp_path / "weights", "vqgan").state_dict()
    state = checkpoint(tmp_path)
    assert any(not torch.equal(state["ema"][key], state["network"][key]) for key in state["ema"])
    for key, value in exported.items():
        assert torch.equal(value, state["ema"][f"vqgan.{key}"].half().float()), key


def test_perceptual_network_is_in_no_checkpoint(stage_of, tmp_path, alone):
    stage = stage_of("vqgan", tmp_path)(alone)
    assert all(key.startswith("vqgan.") for key in stage.network.state_dict())


class Killed(BaseException):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("name", ["vqgan", "dalle"])
def test_a_broken_run_ends_as_an_unbroken_one(stage_of, tmp_path, name, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    plan, often = make_plan(14), make_plan(14, checkpoint_minutes=0)
    train(stage_of(name, tmp_path / "whole"), plan, tmp_path / "whole")

    def breaking(at: int):
        def make(workers):
            stage = stage_of(name, tmp_path / "broken")(workers)
            original = stage.batch

            def batch(samples):
                if samples[0] // BATCH == at:
                    raise Killed
                return original(samples)

            stage.batch = batch
            return stage

        return make

    for at in (4, 9):
        with pytest.raises(Killed):
            train(breaking(at), often, tmp_path / "broken", resume=True)
        assert checkpoint(tmp_path / "broken")["step"] == at
    train(stage_of(name, tmp_path / "broken"), plan, tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    if name == "dalle":
        _, muon = checkpoint(tmp_path / "broken")["optimizers"]
        assert all(state["average"].abs().sum() > 0 for state in muon["state"].values())


def test_lines_logged_after_the_last_checkpoint_are_dropped(stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    train(stage_of("dalle", tmp_path), make_plan(4), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "seconds": 1, "loss": 1}\n{"step": 6, "seco')
    train(stage_of("dalle", tmp_path), make_plan(8), tmp_path, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 9))


def test_a_run_killed_before_its_first_checkpoint_starts_a_new_log(stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 1, "loss": 1}\n{"step": 2, "sec')
    train(stage_of("dalle", tmp_path), make_plan(3), tmp_path, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]


@pytest.fixture
def start():
    """Starter of processes that train a tiny stage; none of them outlives its test."""
    started = []

    def begin(*arguments, launcher=()) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(DRIVER), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["vqgan", "dalle"])
def test_a_killed_process_goes_on_to_the_bit(start, stage_of, data_folder, nano_folder, tmp_path, name):
    """SIGKILL at a random moment: in a step, in validation, or in the middle of writing a checkpoint."""
    out, steps = tmp_path / "killed", {"vqgan": 40, "dalle": 120}[name]
    options = ["--data", data_folder, "--weights", nano_folder, "--out", out, "--steps", steps]
    process = start(name, *options, "--checkpoint-minutes", "0")  # one after every step, so most kills hit one
    wait_for(out / "checkpoint.pt", process)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < checkpoint(out)["step"] < steps
    train(stage_of(name, out), make_plan(steps), out, resume=True)
    train(stage_of(name, tmp_path / "whole"), make_plan(steps), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.rglob("*.part"))


def test_two_processes_see_the_data_and_take_the_steps_of_one(
    start, stage_of, data_folder, nano_folder, tmp_path, alone
):
    out, steps = tmp_path / "two", 12
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--data", data_folder, "--weights", nano_folder, "--out", out, "--steps", steps]
    process = start("dalle", *options, "--trace", tmp_path / "two.trace", launcher=launcher)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    train(stage_of("dalle", tmp_path / "one", tmp_path / "one.trace"), make_plan(steps), tmp_path / "one")

    def samples(*paths: Path) -> dict[int, str]:
        lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        assert len(dict(lines)) == len(lines), "a sample was made twice"
        return dict(lines)

    together = samples(tmp_path / "two.0", tmp_path / "two.1")
    assert together == samples(tmp_path / "one.0")
    assert sorted(together) == list(range(steps * BATCH))
    initial = stage_of("dalle", tmp_path / "one")(alone).network.state_dict()
    one, two = checkpoint(tmp_path / "one"), checkpoint(out)
    assert one["step"] == two["step"] == steps
    for rank in range(2):  # each has computed its own share of Muon's updates
        own = torch.load(tmp_path / f"two.{rank}.pt", weights_only=True)
        assert all(torch.equal(own[key], value) for key, value in two["network"].items())
    way = sum((one["network"][key] - value).pow(2).sum() for key, value in initial.items()).sqrt()
    apart = sum((one["network"][key] - two["network"][key]).pow(2).sum() for key in initial).sqrt()
    assert apart < 0.02 * way  # the mean gradient of two halves is that of the whole, but for rounding
    validation = [read_log(folder, "validation_loss")[-1]["validation_loss"] for folder in (tmp_path / "one", out)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(stage_of, tmp_path, number):
    def make(workers):
        stage = stage_of("dalle", tmp_path)(workers)
        original = stage.batch

        def batch(samples):
            if samples[0] == 7 * BATCH:
                os.kill(os.getpid(), number)
            return original(samples)

        stage.batch = batch
        return stage

    before = signal.getsignal(number)
    train(make, make_plan(1000), tmp_path)
    assert checkpoint(tmp_path)["step"] == 8
    assert (tmp_path / "weights" / "config.json").exists()
    assert signal.getsignal(number) is before


def test_a_deadline_ends_the_run(stage_of, tmp_path):
    plan = Plan(BATCH, 1e-3, minutes=0.01, warmup=2, precision="fp32")
    started = time.monotonic()
    train(stage_of("dalle", tmp_path), plan, tmp_path)
    assert time.monotonic() - started < 60
    assert checkpoint(tmp_path)["seconds"] >= 0.6
    step = checkpoint(tmp_path)["step"]
    train(stage_of("dalle", tmp_path), plan, tmp_path, resume=True)  # the time is used up
    assert checkpoint(tmp_path)["step"] == step


def test_does_not_write_over_another_run(stage_of, tmp_path):
    train(stage_of("dalle", tmp_path), make_plan(1), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        train(stage_of("dalle", tmp_path), make_plan(2), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_batch_must_divide_among_processes(stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "__enter__", lambda self: (vars(self).update(count=3, rank=0), self)[1])
    monkeypatch.setattr(Workers, "__exit__", lambda *_: None)
    with pytest.raises(ValueError, match="--batch 4 cannot be divided among 3"):
        train(stage_of("dalle", tmp_path), make_plan(1), tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr(stages, "token_loss", lambda logits, tokens: logits.sum() * float("nan"))
    with pytest.raises(ValueError, match=r"step 1.*learning-rate"):
        train(stage_of("dalle", tmp_path), make_plan(3), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["vqgan", "dalle"])
def test_small_data_sets_without_held_out_drawings(stage_of, tmp_path, name, monkeypatch):
    """Fifty drawings or fewer may all fall on the training side; that is no reason to lose a run at its first save."""
    everything, none = stages.pairs_data.split, np.array([], int)
    monkeypatch.setattr(stages.pairs_data, "split", lambda data: (np.concatenate(everything(data)), none, none))
    train(stage_of(name, tmp_path), make_plan(2), tmp_path)
    assert checkpoint(tmp_path)["step"] == 2


def test_text_stage_learns_from_the_real_teacher(stage_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 5)
    train(stage_of("text", tmp_path), make_plan(50), tmp_path)
    vectors = np.load(next(tmp_path.glob("teacher-*.npy")))
    assert vectors.shape[1] == stages.TEACHER_WIDTH
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-3)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert -1 <= read_log(tmp_path, "validation_cosine")[-1]["validation_cosine"] <= 1
    tokenizer, encoder = load_tokenizer(tmp_path / "weights"), load_part(tmp_path / "weights", "text_encoder")
    ids = tokenizer.batch(["red box", "绿色盒子"], 16)
    assert encoder(ids, ids != 1).shape == (2, ids.shape[1], 32)
    monkeypatch.setattr(stages, "teach", lambda phrases: pytest.fail("the teacher was asked twice"))
    train(stage_of("text", tmp_path), make_plan(51), tmp_path, resume=True)
