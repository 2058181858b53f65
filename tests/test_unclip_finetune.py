"""Fine-tuning of the DALL-E 2 engine: what the other engine's promises, and what of the model is trained and kept."""

import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_tiny import SMALL
from PIL import Image

from dalle_demo import weights
from dalle_demo.__main__ import main
from dalle_demo.checkpoints import load_part, stored_hash
from dalle_demo.config import UNCLIP_PARTS
from dalle_demo.data import uploads
from dalle_demo.engines import UnclipEngine
from dalle_demo.training import export, finetune, stages
from dalle_demo.training.export import overall, read_log
from dalle_demo.training.finetune import FinetuneSettings
from dalle_demo.training.finetune_stage import FinetuneStage
from dalle_demo.training.loop import Run
from dalle_demo.training.unclip_finetune_stage import TRAINED, UnclipFinetuneStage
from dalle_demo.weights import WeightsError, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch, shipped):
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(weights, "SHIPPED", shipped)


@pytest.fixture
def base(shipped) -> Path:
    """Folder of the tiny DALL-E 2."""
    return shipped / "unclip-nano"


@pytest.fixture
def settings(base, data):
    """Maker of settings of a short run."""
    return lambda **given: FinetuneSettings(**{"base": str(base), "data": str(data), "steps": 20, "rank": 4} | given)


@pytest.fixture
def stage(tmp_path, alone, settings) -> UnclipFinetuneStage:
    finetune.bring_data(settings(), tmp_path / "stage", resume=False)
    return UnclipFinetuneStage(settings(), settings().plan(), tmp_path / "stage", alone)


def drawn(preset: Path) -> list[bytes]:
    """Pictures of a model."""
    engine = UnclipEngine.load(str(preset), threads=1)
    (last,) = engine.generate(engine.params("a red box", n=2, seed=1), previews=False)
    return [picture.tobytes() for picture in last.images]


# whole runs


def test_the_command_line_leaves_everything_and_its_weights_draw(upload, base, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["train", "finetune", "--base", "unclip-nano", "--data", str(upload), "--out", str(out)]
    assert main([*flags, "--steps", "20", "--prompt", "a red box", "--learning-rate", "1e-3"]) == 0
    told = json.loads((out / "state.json").read_text())
    assert (told["state"], told["step"], told["steps"]) == ("done", 20, 20)
    lines = read_log(out, "validation_loss")
    assert [line["step"] for line in lines] == list(range(0, 21, 4))
    assert lines[-1]["seen_loss"] < 0.99 * lines[0]["seen_loss"]
    assert {"loss", "flow", "reconstruction", "discriminator", "learning_rate"} <= read_log(out, "loss")[0].keys()
    assert len(list((out / "previews").glob("*.png"))) == len(list((out / "previews").glob("*.json"))) == 6
    assert Image.open(out / "reconstruction.png").height > 64
    assert json.loads((out / "settings.json").read_text())["method"] == "full"
    folder = out / "weights"
    changed = {part for part in UNCLIP_PARTS if stored_hash(folder, part) != stored_hash(base, part)}
    assert changed == {"prior", "generator", "noise_encoder", "discriminator"}
    card = (folder / "README.md").read_text()
    assert "all weights of prior, generator, noise_encoder, discriminator" in card
    assert "nats" not in card
    check(folder)
    assert drawn(folder) != drawn(base)
    command = ["generate", "a red box", "--preset", str(folder), "--n", "1", "--out", str(tmp_path / "pictures")]
    assert main(command) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert main([*flags, "--resume", "--steps", "21"]) == 0
    assert main([*flags, "--resume", "--method", "lora"]) == 2
    assert "--method must be full" in capsys.readouterr().err
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("given", [{"method": "lora"}, {"text_encoder": True}])
def test_what_does_not_apply_is_refused_by_name(settings, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        settings(**given)


def test_each_base_has_its_own_method(settings, nano_folder):
    assert settings().method == settings(method="full").method == "full"
    assert settings(base=str(nano_folder)).method == "lora"
    assert settings(base=str(nano_folder), method="full").method == "full"


def test_an_export_needs_its_clip(settings, tmp_path, shipped, monkeypatch):
    finetune.finetune(settings(steps=2), tmp_path / "run")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(WeightsError, match="needs clip-nano"):
        check(tmp_path / "run" / "weights")
    (tmp_path / "clip-nano").symlink_to(shipped / "clip-nano")
    check(tmp_path / "run" / "weights")
    archive = export.pack(tmp_path / "run", "mine", tmp_path / "mine.zip")
    zipfile.ZipFile(archive).extractall(tmp_path)
    check(tmp_path / "mine")


def test_a_killed_process_goes_on_to_the_bit(processes, settings, base, tmp_path):
    processes.assert_goes_on(base, tmp_path, 60, partial(finetune.finetune, settings(steps=60)))


def test_two_processes_take_the_steps_of_one(processes, settings, base, tmp_path):
    """Nearly: each decodes its own pictures for CLIP to look at."""
    finetune.finetune(settings(steps=4), tmp_path / "one")
    processes.run_in_two(base, tmp_path / "two", 4)
    one, two = (read_log(tmp_path / name, "validation_loss") for name in ("one", "two"))
    assert overall(one[0]) == overall(two[0])
    assert overall(one[-1]) == pytest.approx(overall(two[-1]), rel=1e-2)


def test_stop_keeps_what_was_best(settings, tmp_path, monkeypatch):
    choose = FinetuneStage.choose

    def asked(self, samples):
        if samples[0] // self.plan.batch == 5:
            (tmp_path / "ask").write_text("stop")
        return choose(self, samples)

    monkeypatch.setattr(FinetuneStage, "choose", asked)
    finetune.finetune(settings(), tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "stopped"
    assert read_log(tmp_path, "validation_loss")[-1] | {"stopped": 1, "step": 6} == read_log(tmp_path)[-1]
    check(tmp_path / "weights")


# the stage


def test_training_never_sees_held_out_pictures_and_drops_captions(stage):
    training, held_out = uploads.split(stage.examples)
    assert len(held_out) >= 1
    chosen = list(stage.choose(range(400)))
    texts = {caption for caption, *_ in chosen}
    assert texts == {stage.examples[i].caption for i in training} | set(stage.kept) | {""}
    known = np.concatenate([stage.encoded[training].reshape(-1, stage.encoded.shape[-1]), stage.kept_encoded])
    assert all((known == row).all(1).any() for _, row, *_ in chosen[:50])
    own = [(stage.kept_encoded == row).all(1).any() for _, row, *_ in chosen]
    assert own == [of_base for _, _, of_base, _ in chosen]
    assert 0.3 < np.mean(own) < 0.5
    batch = stage.batch(range(400))
    dropped = (batch["prior"]["text"] == 0).all(1).float().mean()
    assert 0.04 < dropped < 0.18
    assert batch["unclip"]["contested"] is True, "the base's discriminator is trained"
    halves = [stage.batch(range(start, start + 4)) for start in (0, 4)]
    for part in ("prior", "unclip"):
        for name, value in stage.batch(range(8))[part].items():
            if name != "contested":
                assert torch.equal(value, torch.cat([half[part][name] for half in halves])), name


def test_what_is_learned_is_what_clip_and_vae_see(stage):
    latents, embeddings = stage._split(stage.encoded[3])
    pixels = stage.pixels([stage.examples[3]])
    torch.testing.assert_close(latents[:1], stage.base.vae.encode(pixels)[0], atol=1e-5, rtol=1e-4)
    size = stage.config.clip.image_size
    seen = stage.base.clip.clip.encode_image(stages.resize(pixels, size))
    torch.testing.assert_close(embeddings[:1], seen, atol=1e-5, rtol=1e-4)
    assert not torch.equal(latents[0], latents[1]), "a render"


def test_what_is_kept_is_what_the_base_draws(stage, unclip):
    latents, embeddings = stage._split(stage.kept_encoded)
    params = unclip.params(stage.kept[1], n=1, seed=1, guidance_scale=1.0, truncation=1.0, candidates=1)
    seen = unclip.imagine(params)
    torch.testing.assert_close(embeddings[1:2], seen.embedding, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents[1:2], unclip.model.generator(seen.noise, seen.embedding), atol=1e-4, rtol=1e-4)


def test_it_begins_with_all_that_is_in_the_base_and_changes_all_of_it(stage, base, tmp_path, alone):
    for part, module in stage.network.parts().items():
        for key, value in load_part(base, part).state_dict().items():
            assert torch.equal(module.state_dict()[key], value), (part, key)
    run = Run(stage, stage.plan, tmp_path, alone, finetune.loop.Monitor())
    run.done = 0.0
    run.take_step()
    assert set(stage.network.parts()) == set(TRAINED)
    for part, module in stage.network.parts().items():
        assert any(not torch.equal(module.state_dict()[k], v) for k, v in load_part(base, part).state_dict().items())
    assert not any(p.requires_grad for p in stage.base.clip.clip.parameters())


def test_validation_is_the_same_each_time_and_tells_parts_apart(stage):
    torch.manual_seed(1)
    before = stage.validate(stage.network)
    torch.manual_seed(2)
    assert stage.validate(stage.network) == before
    assert before.keys() == {"validation_loss", "seen_loss"}
    for part in ("prior", "generator", "noise_encoder"):
        module = stage.network.parts()[part]
        kept = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        assert stage.validate(stage.network)["seen_loss"] != before["seen_loss"], part
        module.load_state_dict(kept)


def test_previews_leave_the_network_as_it_is(stage):
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    engine = stage.engine(stage.network)
    (last,) = engine.generate(engine.params("a red box", n=2, seed=1), previews=False)
    assert len(last.images) == 2
    assert all(torch.equal(value, before[key]) for key, value in stage.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in stage.network.parameters())


def test_an_estimate_is_measured(settings, data):
    estimate = finetune.probe(settings(), data)
    assert 0 < estimate.seconds_per_step < 10
    assert estimate.seconds > 20 * estimate.seconds_per_step
    assert 1e8 < estimate.memory < 2e9
