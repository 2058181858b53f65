"""The DALL-E 2 engine's stages learn from what they may see, go on to the bit, and make weights that draw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_random, tiny_unclip_config
from train_tiny import BATCH, make_plan

from dalle_demo.checkpoints import WeightsError
from dalle_demo.engines import UnclipEngine
from dalle_demo.training import loop, unclip_stages
from dalle_demo.training.loop import train
from dalle_demo.training.unclip_stages import CLIPStage, PriorStage, UnclipStage, VAEStage, retrieval
from dalle_demo.weights import assemble_unclip

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = tiny_unclip_config()
STAGES = ("vae", "clip", "prior", "unclip")


@pytest.fixture
def stage_of(data_folder, nano_folder, shipped):
    """Maker of makers: name, out -> what `train` takes."""
    clip, unclip = shipped / "clip-nano", shipped / "unclip-nano"

    def make(name: str, out: Path, vae: Path = unclip):
        out.mkdir(parents=True, exist_ok=True)
        return {
            "vae": lambda workers: VAEStage(data_folder, CONFIG.vae, nano_folder),
            "clip": lambda workers: CLIPStage(data_folder, CONFIG, nano_folder),
            "prior": lambda workers: PriorStage(data_folder, CONFIG, clip, out, workers),
            "unclip": lambda workers: UnclipStage(data_folder, CONFIG, clip, vae, out, workers),
        }[name]

    return make


def figures(out: Path, key: str) -> list[float]:
    """What the log says of one figure."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("name", STAGES)
def test_samples_do_not_depend_on_how_they_are_grouped(stage_of, tmp_path, name, alone):
    stage = stage_of(name, tmp_path / "run")(alone)
    torch.manual_seed(1)
    whole = stage.batch(range(8, 16))
    torch.manual_seed(2)  # global state decides nothing
    halves = [stage.batch(range(8, 12)), stage.batch(range(12, 16))]
    for key, value in whole.items():
        if isinstance(value, torch.Tensor) and key != "text_ids":  # whose padding depends on the batch
            torch.testing.assert_close(value, torch.cat([half[key] for half in halves]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "key"), [("vae", "pixel"), ("clip", "loss"), ("prior", "loss"), ("unclip", "reconstruction")]
)
def test_loss_goes_down(stage_of, tmp_path, name, key, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    train(stage_of(name, tmp_path / "run"), make_plan(60), tmp_path / "run")
    found = figures(tmp_path / "run", key)
    assert np.mean(found[-6:]) < 0.93 * np.mean(found[:6])


def test_a_broken_run_ends_as_an_unbroken_one(stage_of, tmp_path, monkeypatch):
    """The discriminator comes in before the break; its state and its part in the losses go on as well."""
    monkeypatch.setattr(unclip_stages, "ADVERSARIAL_FROM", 3 * BATCH)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(stage_of("unclip", whole), make_plan(8), whole)
    step = loop.Run.take_step

    def breaking(run):
        if run.step == 5:
            raise InterruptedError
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "take_step", breaking)
        with pytest.raises(InterruptedError):
            train(stage_of("unclip", broken), make_plan(8, checkpoint_minutes=0), broken)
    train(stage_of("unclip", broken), make_plan(8), broken, resume=True)
    assert len(figures(whole, "discriminator")) == 5  # of 8 steps
    weights = [(out / "weights/model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]


def test_nothing_held_out_is_trained_on(stage_of, tmp_path, alone, monkeypatch):
    split = unclip_stages.pairs_data.split
    found = split(stage_of("clip", tmp_path)(alone).pairs)
    hidden = found.training[:4]  # as if these were held out
    fewer = unclip_stages.pairs_data.Split(found.training[4:], found.styles, hidden)
    monkeypatch.setattr(unclip_stages.pairs_data, "split", lambda pairs: fewer)
    clip, unclip = stage_of("clip", tmp_path)(alone), stage_of("unclip", tmp_path / "run")(alone)
    seen = set(clip.training) | {i for row in unclip.views.rows for i in [unclip.views.drawings[row]]}
    for scenes in (clip.scenes, unclip.views.scenes):
        seen |= {i for style in scenes.by_style.values() for i in style}
    assert seen
    assert not seen & {*hidden, *found.styles}


def test_a_view_is_the_same_each_time_and_its_caption_is_that_of_its_scene(stage_of, tmp_path, alone):
    views = stage_of("prior", tmp_path / "run")(alone).views
    torch.testing.assert_close(views.render(3), views.render(3), atol=0, rtol=0)
    scene = views.view(3, 2).scene
    assert views.view(3, 2).caption(views.pairs, np.random.default_rng(0)) == scene.caption
    as_it_is, moved = views.view(3, 0), views.view(3, 1)
    assert as_it_is.scene is None
    assert (as_it_is.zoom, as_it_is.shift) == (1.0, (0.0, 0.0))
    assert moved.scene is None
    assert moved.zoom != 1.0


def test_embeddings_of_views_are_those_of_their_pixels(stage_of, tmp_path, alone):
    views = stage_of("prior", tmp_path / "run")(alone).views
    expected = views.clip.encode_image(views.render(5)).half().numpy()
    np.testing.assert_allclose(views.embeddings[5], expected, atol=2e-3)


@pytest.fixture
def contest(stage_of, tmp_path, alone):
    """Objective of the generator, and a function that gives a batch's losses, gradients and the batch."""
    stage = stage_of("unclip", tmp_path / "run")(alone)
    objective = stage.network.train()
    for part in (objective.generator, objective.discriminator):  # as far as zeros are in the way of gradients
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    def losses(contested: bool, **changes):
        objective.zero_grad()
        batch = stage.batch(range(8)) | {"contested": contested} | changes
        found = objective(**batch)
        found["loss"].backward()
        grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
        return {name: float(value.detach()) for name, value in found.items()}, grads, batch

    return objective, losses


def moved(grads: dict[str, torch.Tensor], part: str) -> float:
    """How strong the gradient of a part is."""
    return sum(float(grad.abs().sum()) for name, grad in grads.items() if name.startswith(part))


def test_losses_before_the_contest(contest):
    objective, losses = contest
    found, grads, batch = losses(False)
    assert found.keys() == {"loss", "reconstruction", "kl"}
    expected = found["reconstruction"] + unclip_stages.NOISE_KL_WEIGHT * found["kl"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        mean, logvar = objective.noise_encoder(batch["latents"], batch["embedding"])
        rebuilt = objective.generator(mean + torch.exp(logvar / 2) * batch["posterior"], batch["embedding"])
    assert found["reconstruction"] == pytest.approx((rebuilt - batch["latents"]).abs().mean().item(), rel=1e-4)
    assert moved(grads, "generator") > 0
    assert moved(grads, "noise_encoder") > 0
    assert moved(grads, "discriminator") == 0


def test_losses_of_the_contest(contest):
    """Each player is moved by its own loss: the generator to higher scores, the discriminator to tell apart."""
    objective, losses = contest
    calm, calm_grads, _ = losses(False)
    found, grads, batch = losses(True)
    expected = calm["loss"] + unclip_stages.EMBEDDING_WEIGHT * found["embedding"]
    expected += found["weight"] * found["adversarial"] + found["discriminator"]
    assert found["loss"] == pytest.approx(expected + unclip_stages.GRADIENT_PENALTY * found["penalty"], rel=1e-4)
    with torch.no_grad():
        vae, clip = objective._fixed
        drawn = objective.generator(batch["noise"][:4], batch["embedding"][:4])
        near = (clip.encode_image(vae.decode(drawn)) * batch["shown"][:4]).sum(1)
    assert found["embedding"] == pytest.approx(1 - near.mean().item(), abs=1e-4)
    assert not torch.allclose(batch["shown"], batch["embedding"], atol=1e-3)  # what is given is not exact
    assert found["penalty"] > 0
    assert moved(grads, "discriminator") > 0
    few = 4

    def scores():
        with torch.no_grad():
            drawn = objective.generator(batch["noise"][:few], batch["embedding"][:few])
            real = objective.discriminator(batch["latents"], batch["embedding"])
            return real, objective.discriminator(drawn, batch["embedding"][:few])

    real, drawn = scores()
    assert found["adversarial"] == pytest.approx(-drawn.mean().item(), rel=1e-4, abs=1e-4)
    assert found["discriminator"] == pytest.approx(
        (1 - real).relu().mean().item() + (1 + drawn).relu().mean().item(), rel=1e-4, abs=1e-4
    )
    with torch.no_grad():  # a step of the generator along what the contest adds to its gradient
        for name, parameter in objective.named_parameters():
            if name.startswith("generator"):
                parameter -= 1e-4 * (grads[name] - calm_grads[name]) / max(found["weight"], 1e-6)
    assert scores()[1].mean() > drawn.mean()


def test_some_captions_are_dropped_for_guidance(stage_of, tmp_path, alone):
    stage = stage_of("prior", tmp_path / "run")(alone)
    dropped = [row.eq(0).all().item() for row in stage.batch(range(400))["text"]]
    assert 0.05 < np.mean(dropped) < 0.16


def test_retrieval_counts_ties_as_misses():
    near = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.3, 0.3]])
    assert retrieval(near, 1) == pytest.approx(1 / 3)
    assert retrieval(near, 2) == pytest.approx(2 / 3)
    assert retrieval(near, 3) == 1


def test_all_stages_together_make_a_model_that_draws(stage_of, shipped, tmp_path):
    folders = {name: tmp_path / name for name in ("vae", "prior", "unclip")}
    for name, out in folders.items():
        vae = {"vae": folders["vae"] / "weights"} if name == "unclip" else {}
        train(stage_of(name, out, **vae), make_plan(2), out)
    clip, made = shipped / "clip-nano", tmp_path / "made"
    (tmp_path / "clip-nano").symlink_to(clip)
    assemble_unclip(folders["prior"] / "weights", folders["unclip"] / "weights", clip, made, {"guidance_scale": 2.0})
    engine = UnclipEngine.load(str(made))
    (last,) = engine.generate(engine.params("a red box", n=3, seed=1))
    assert [picture.size for picture in last.images] == [(32, 32)] * 3
    assert engine.params("a red box").guidance_scale == 2.0


@pytest.mark.parametrize("name", ["prior", "unclip"])
def test_stages_are_not_put_together_with_a_clip_that_they_have_not_seen(stage_of, shipped, tmp_path, name):
    vae = tmp_path / "vae"
    train(stage_of("vae", vae), make_plan(1), vae)
    given = {"vae": vae / "weights"} if name == "unclip" else {}
    train(stage_of(name, tmp_path / name, **given), make_plan(1), tmp_path / name)
    other = save_random(tmp_path / "other", {"clip": tiny_unclip_config().clip})
    with pytest.raises(WeightsError, match=f"{name}/weights was trained with another CLIP"):
        assemble_unclip(*2 * [tmp_path / name / "weights"], other, tmp_path / "made", {})
    assert not (tmp_path / "made").exists()
