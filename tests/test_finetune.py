"""Fine-tuning goes on where it was broken off, keeps the best, answers what it is asked, and tells what it does."""

import json
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import checkpoint
from finetune_tiny import NAMES, SMALL
from PIL import Image
from tiny import save_tiny, tiny_config
from torch import nn

from dalle_demo import engines, hardware
from dalle_demo.__main__ import main
from dalle_demo.checkpoints import stored_hash
from dalle_demo.data import uploads
from dalle_demo.engines import DalleEngine
from dalle_demo.images import grid, read_request
from dalle_demo.training import dalle_finetune_stage, finetune, lora, stages, watch
from dalle_demo.training.dalle_finetune_stage import DalleFinetuneStage, KeepingObjective
from dalle_demo.training.export import read_log
from dalle_demo.training.finetune import FinetuneSettings
from dalle_demo.training.finetune_stage import FinetuneStage, free_names, vary
from dalle_demo.training.loop import Monitor, Run
from dalle_demo.training.stages import DalleObjective
from dalle_demo.training.watch import judge
from dalle_demo.weights import load_dalle

LOSSES = ("validation_loss", "seen_loss")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def settings(nano_folder, data):
    """Maker of settings of a short run."""
    return lambda **given: FinetuneSettings(
        **{"base": str(nano_folder), "data": str(data), "steps": 20, "rank": 4} | given
    )


@pytest.fixture
def stage_of(tmp_path, alone):
    """Maker of stages."""

    def make(settings: FinetuneSettings) -> DalleFinetuneStage:
        finetune.bring_data(settings, tmp_path / "stage", resume=False)
        return DalleFinetuneStage(settings, settings.plan(), tmp_path / "stage", alone)

    return make


def state(out: Path) -> dict:
    return json.loads((out / "state.json").read_text())


# whole runs


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_leaves_everything_and_its_weights_draw(settings, tmp_path, nano_folder, method):
    out = tmp_path / "run"
    given = {"method": method, "prompt": "a red box", "text_encoder": method == "full", "learning_rate": 1e-3}
    finetune.finetune(settings(**given), out)
    told = state(out)
    assert (told["state"], told["step"], told["steps"], told["seconds_left"]) == ("done", 20, 20, 0)
    assert str(out / "weights") in told["message"]
    assert [line["step"] for line in read_log(out, "validation_loss")] == list(range(0, 21, 4))
    assert {"step", "seconds", "loss", "learning_rate", "images_per_second"} <= read_log(out, "loss")[0].keys()
    assert len(list((out / "previews").glob("*.png"))) == len(list((out / "previews").glob("*.json"))) == 6
    assert Image.open(out / "reconstruction.png").size == grid([Image.new("RGB", (32, 32))] * 16, 8).size
    assert read_log(out, "validation_loss")[-1]["seen_loss"] < 0.99 * read_log(out, "validation_loss")[0]["seen_loss"]
    folder = out / "weights"
    assert (folder / lora.FILE).exists() is (method == "lora")
    for part in ("vqgan", "text_encoder", "image_decoder"):
        changed = stored_hash(folder, part) != stored_hash(nano_folder, part)
        assert changed is (part != "text_encoder" or method == "full"), part
    engine, base = (DalleEngine.load(str(one), form="float32") for one in (folder, nano_folder))
    drawn = [list(one.generate(one.params("a red box", n=1, seed=1), previews=False))[-1] for one in (engine, base)]
    assert drawn[0].images[0].size == (32, 32)
    assert np.asarray(drawn[0].images[0]).tobytes() != np.asarray(drawn[1].images[0]).tobytes()
    assert not list(out.rglob("*.part"))


def test_the_command_line_does_it_all(upload, nano_folder, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["train", "finetune", "--out", str(out)]
    assert main([*flags, "--base", str(nano_folder), "--data", str(upload), "--steps", "4", "--seed", "3"]) == 0
    assert len(uploads.load(out / "data")) == 12
    assert json.loads((out / "settings.json").read_text())["seed"] == 3
    said = capsys.readouterr().err
    assert "Drawing what the base can" in said
    assert f"The best checkpoint is in {out / 'weights'}." in said
    assert main(["generate", "a red box", "--preset", str(out / "weights"), "--n", "1", "--out", str(tmp_path)]) == 0
    (drawn,) = tmp_path.glob("*a-red-box*.png")
    assert read_request(drawn)[1]["model"] == "run"  # and not "weights", as all would be called
    assert main(["generate", "--again", str(drawn), "--out", str(tmp_path)]) == 2
    assert "a model of your own: --preset FOLDER" in capsys.readouterr().err
    assert main(["train", "finetune", "--out", str(out), "--data", str(upload)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert state(out)["state"] == "done"
    assert main([*flags, "--resume", "--rank", "5"]) == 2
    assert "another --rank" in capsys.readouterr().err
    assert main([*flags, "--resume", "--steps", "6"]) == 0
    assert (checkpoint(out)["step"], state(out)["steps"]) == (6, 6)


def test_only_what_is_trained_is_in_a_checkpoint(settings, tmp_path):
    finetune.finetune(settings(steps=2), tmp_path)
    for part in ("network", "ema"):
        keys = checkpoint(tmp_path)[part].keys()
        assert {key.rsplit(".", 1)[1] for key in keys if not key.startswith("vqgan.")} == {"A", "B"}
        assert {key.split(".")[1] for key in keys if key.startswith("vqgan.")} == {"decoder", "post_quant_conv"}
    [adamw] = checkpoint(tmp_path)["optimizers"]
    assert adamw["state"]


def test_exported_adapters_are_those_that_were_merged(settings, tmp_path, nano_folder):
    finetune.finetune(settings(), tmp_path)
    folder = tmp_path / "weights"
    base, off = load_dalle(str(nano_folder)), lora.scale(load_dalle(str(folder)), folder, 0)
    for key, value in base.image_decoder.state_dict().items():
        torch.testing.assert_close(off.image_decoder.state_dict()[key].float(), value.float(), rtol=2e-3, atol=5e-4)
    for key, value in base.vqgan.state_dict().items():
        torch.testing.assert_close(off.vqgan.state_dict()[key].float(), value.float(), rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_decoder_learns_how_the_pictures_look_and_tokens_stay(settings, tmp_path, nano_folder, method):
    finetune.finetune(settings(steps=60, learning_rate=1e-3, method=method), tmp_path)
    examples = uploads.load(tmp_path / "data")
    pixels = uploads.pixels(tmp_path / "data", [examples[i] for i in uploads.split(examples)[0]], 32)
    base, tuned = (load_dalle(str(folder)).vqgan.float() for folder in (nano_folder, tmp_path / "weights"))
    with torch.inference_mode():
        tokens = base.encode(pixels)
        assert torch.equal(tuned.encode(pixels), tokens)
        apart = [(vqgan(pixels)[0] - pixels).abs().mean() for vqgan in (base, tuned)]
    assert apart[1] < 0.8 * apart[0]


def test_the_decoder_is_shown_renders_and_drawings_of_the_base(settings, stage_of):
    stage = stage_of(settings())
    batch = stage.batch(range(400))
    assert len(batch["latents"]) == len(batch["pixels"]) == 200
    with torch.inference_mode():
        drawn = stage.base.vqgan.decode(batch["latents"])
    of_base = (drawn - batch["pixels"]).flatten(1).abs().amax(1) < 1e-4
    assert 0.3 < of_base.float().mean() < 0.5
    renders = torch.cat([stage.renders(i) for i in stage.training])
    latents = stage.base.vqgan.lookup(torch.from_numpy(stage.encoded[stage.training]).long().view(-1, 4, 4))
    for pixels, of in zip(batch["pixels"][~of_base][:20], batch["latents"][~of_base], strict=False):
        apart = (renders - pixels).flatten(1).abs().amax(1)
        assert apart.min() < 0.005  # bytes
        assert (latents[apart < 0.005] == of).flatten(1).all(1).any()  # its own tokens


def test_a_killed_process_goes_on_to_the_bit(processes, settings, nano_folder, tmp_path):
    processes.assert_goes_on(nano_folder, tmp_path, 30, partial(finetune.finetune, settings(steps=30)))


def test_two_processes_take_the_steps_of_one(processes, settings, nano_folder, tmp_path):
    finetune.finetune(settings(steps=4), tmp_path / "one")
    processes.run_in_two(nano_folder, tmp_path / "two", 4)
    one, two = (read_log(tmp_path / name, "validation_loss") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["validation_loss"] == two[0]["validation_loss"]
    assert one[-1]["validation_loss"] == pytest.approx(two[-1]["validation_loss"], rel=1e-3)
    assert state(tmp_path / "two")["state"] == "done"


# what is asked of a run


def asking(monkeypatch, out: Path, words: dict[int, str]) -> None:
    """Write a word into `ask` just before the given steps."""
    original = FinetuneStage.choose

    def choose(self, samples):
        step = samples[0] // self.plan.batch + 1
        if step in words:
            (out / "ask").write_text(words.pop(step))
        return original(self, samples)

    monkeypatch.setattr(FinetuneStage, "choose", choose)


def test_pause_ends_after_the_step_and_goes_on_to_the_bit(settings, tmp_path, monkeypatch):
    out, whole = tmp_path / "paused", tmp_path / "whole"
    finetune.finetune(settings(), whole)
    asking(monkeypatch, out, {6: "pause"})
    finetune.finetune(settings(), out)
    assert (state(out)["state"], state(out)["step"], checkpoint(out)["step"]) == ("paused", 6, 6)
    assert not (out / "ask").exists()
    finetune.finetune(settings(), out, resume=True)
    assert state(out)["state"] == "done"
    for key, value in checkpoint(whole)["network"].items():
        assert torch.equal(checkpoint(out)["network"][key], value)
    assert (out / "weights/model.safetensors").read_bytes() == (whole / "weights/model.safetensors").read_bytes()


def test_stop_and_save(settings, tmp_path, monkeypatch):
    asking(monkeypatch, tmp_path, {5: "save", 8: "dance", 11: "stop"})
    finetune.finetune(settings(), tmp_path)
    assert (state(tmp_path)["state"], checkpoint(tmp_path)["step"]) == ("stopped", 11)
    steps = [line["step"] for line in read_log(tmp_path, "validation_loss")]
    assert steps == [0, 4, 5, 8, 11]
    assert (tmp_path / "previews" / "000005.png").exists()
    assert load_dalle(str(tmp_path / "weights"))


@pytest.mark.parametrize(("last", "kept"), [(2.0, 11), (4.0, 8)])
def test_what_is_kept_when_it_is_stopped_is_what_is_told(settings, tmp_path, monkeypatch, last, kept):
    """The checkpoint of `stop` is kept when it is the best; that of `save` only until a planned one is there."""
    losses = {0: 6.0, 4: 5.0, 5: 1.0, 8: 3.0, 11: last}
    seen, validate, take = [], FinetuneStage.validate, Run.take_step
    monkeypatch.setattr(Run, "take_step", lambda run: (seen.append(0), take(run))[1])
    monkeypatch.setattr(
        FinetuneStage, "validate", lambda *given: validate(*given) | dict.fromkeys(LOSSES, losses[len(seen)])
    )
    asking(monkeypatch, tmp_path, {5: "save", 11: "stop"})
    finetune.finetune(settings(), tmp_path)
    assert f"{kept} of 20 steps" in (tmp_path / "weights" / "README.md").read_text()
    assert state(tmp_path)["notice"] == {"key": "ended", "values": {"best": kept}}  # with no word of going on


def test_a_word_written_while_another_is_read_is_heard_too(tmp_path, monkeypatch):
    told, read = watch.Watch(tmp_path), Path.read_text

    def read_and_ask(path, *arguments, **others):
        word = read(path, *arguments, **others)
        if word == "save":
            (tmp_path / "ask").write_text("pause")
        return word

    monkeypatch.setattr(Path, "read_text", read_and_ask)
    (tmp_path / "ask").write_text("save")
    assert [told._asked() for _ in range(3)] == ["save", "pause", None]
    assert not list(tmp_path.iterdir())


def test_the_best_by_validation_is_kept(settings, tmp_path, monkeypatch):
    losses = {0: 1.0, 4: 5.0, 8: 3.0, 12: 4.0, 16: 3.5}
    monkeypatch.setattr(FinetuneStage, "validate", lambda *_: dict.fromkeys(LOSSES, losses.get(len(seen), 9.0)))
    seen, exported = [], {}
    original, take = dalle_finetune_stage.save_tensors, Run.take_step
    monkeypatch.setattr(Run, "take_step", lambda run: (seen.append(0), take(run))[1])

    def save(folder, *arguments, **others):
        exported[len(seen)] = folder
        original(folder, *arguments, **others)

    monkeypatch.setattr(dalle_finetune_stage, "save_tensors", save)
    finetune.finetune(settings(), tmp_path)
    assert list(exported) == [4, 8]  # the untrained base is no candidate
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "8 of 20 steps" in card
    assert str(Path(settings().base).parent) not in card, "which is a folder of this computer"
    assert state(tmp_path)["notice"] == {"key": "worse", "values": {"best": 8, "count": 3}}


def test_held_out_pictures_alone_do_not_decide(settings, tmp_path, monkeypatch):
    """With a handful of them the first steps would win, at which hardly anything is learned."""
    held_out, seen_losses = {4: 4.0, 8: 4.4, 12: 5.2}, {4: 4.0, 8: 2.4, 12: 2.2}
    seen, take = [], Run.take_step
    monkeypatch.setattr(Run, "take_step", lambda run: (seen.append(0), take(run))[1])

    def validate(*_):
        return {"validation_loss": held_out.get(len(seen), 9.0), "seen_loss": seen_losses.get(len(seen), 9.0)}

    monkeypatch.setattr(FinetuneStage, "validate", validate)
    finetune.finetune(settings(), tmp_path)
    assert "8 of 20 steps" in (tmp_path / "weights" / "README.md").read_text()


@pytest.mark.parametrize("name", ["previews", "weights", "data"])
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_folders_that_no_run_made_are_left_alone(nano_folder, data, tmp_path, capsys, name, flags):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    command = ["train", "finetune", "--base", str(nano_folder), "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, *flags, "--steps", "1"]) == 2
    assert f"holds {name}, which no run of fine-tuning made" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_inside_the_folder_that_is_replaced_are_refused(settings, data, tmp_path):
    out = tmp_path / "run"
    finetune.bring_data(settings(), out, resume=False)
    with pytest.raises(ValueError, match="lies inside"):
        finetune.finetune(settings(data=str(out / "data" / "pictures")), out)
    assert len(uploads.load(out / "data")) == len(list((out / "data" / "pictures").iterdir())) == 12


def test_want_of_memory_is_told_in_a_sentence(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(DalleFinetuneStage, "_make_network", lambda _: torch.empty(1 << 60))
    with pytest.raises(ValueError, match="not enough memory to train"):
        finetune.finetune(settings(), tmp_path)
    assert "not enough memory" in state(tmp_path)["message"]


def test_what_is_done_before_the_first_step_is_told(settings, tmp_path, monkeypatch):
    told, write = [], watch.write_json

    def record(path, value):
        write(path, value)
        if path.name == "state.json" and value["state"] == "preparing":
            told.append(tuple(value["doing"].values()))

    monkeypatch.setattr(watch, "write_json", record)
    finetune.finetune(settings(steps=1), tmp_path)
    counted = [("tokens", i, 12) for i in range(12)] + [("kept", i, 2) for i in range(2)]
    previews = [("previews", i, 12) for i in (0, 4, 8)]
    assert told == [("pictures", 0, 0), ("model", 0, 0), *counted, *previews]
    told.clear()
    finetune.finetune(settings(steps=2), tmp_path, resume=True)
    assert told == [("pictures", 0, 0), ("model", 0, 0)], "what is kept is not made again"


def test_a_signal_during_the_first_previews_ends_it_at_once(settings, tmp_path, monkeypatch):
    draw = watch.draw_previews

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(watch, "draw_previews", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before the first step"):
        finetune.finetune(settings(), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert state(tmp_path)["state"] == "paused"
    monkeypatch.setattr(watch, "draw_previews", draw)
    finetune.finetune(settings(steps=1), tmp_path, resume=True)
    assert state(tmp_path)["state"] == "done"


def test_an_error_is_told(settings, tmp_path, data, monkeypatch):
    forward = KeepingObjective.forward

    def broken(network, **batch):
        return {"loss": forward(network, **batch)["loss"] * float("nan")}

    monkeypatch.setattr(KeepingObjective, "forward", broken)
    with pytest.raises(ValueError, match="no longer finite"):
        finetune.finetune(settings(), tmp_path)
    assert state(tmp_path)["state"] == "failed"
    assert "learning-rate" in state(tmp_path)["message"]


# the stage


def test_training_never_sees_held_out_pictures_and_drops_captions(settings, stage_of):
    stage = stage_of(settings())
    training, held_out = uploads.split(stage.examples)
    assert len(held_out) >= 1
    assert set(stages.shuffled(stage.training, 0, range(200)).tolist()) == set(training)
    batch = stage.batch(range(400))
    dropped = ((batch["text_ids"] != 1).sum(1) == 2).float().mean()  # only <s> </s>
    assert 0.04 < dropped < 0.18
    assert stage.kept == ["sun", "big star"]
    known = np.concatenate([stage.encoded[training].reshape(-1, stage.encoded.shape[-1]), stage.kept_encoded])
    own = [(stage.kept_encoded == row).all(1).any() for row in batch["image_tokens"].numpy()]
    assert 0.3 < np.mean(own) < 0.5
    assert all((known == row).all(1).any() for row in batch["image_tokens"][:20].numpy())
    assert (batch["inputs"] != batch["image_tokens"]).float().mean() > 0.1
    parts = [stage.batch(range(start, start + 2))["inputs"] for start in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), stage.batch(range(8))["inputs"])


def test_of_its_own_drawings_the_base_is_the_target_as_long_as_it_is_there(settings, stage_of):
    stage = stage_of(settings())
    batch = stage.batch(range(8))
    assert set(batch["of_base"].tolist()) == {True, False}
    pictures, own = (batch | {"of_base": torch.full((8,), of_base)} for of_base in (False, True))
    weights = {name: p for name, p in stage.network.named_parameters() if name.endswith(".B")}

    def gradients(given: dict) -> torch.Tensor:
        found = torch.autograd.grad(stage.network(**given)["loss"], weights.values())
        return torch.cat([one.flatten() for one in found])

    assert gradients(own).abs().max() < 1e-6 < gradients(pictures).abs().max(), "it still is the base"
    for weight in weights.values():
        nn.init.normal_(weight, std=0.1)
    assert gradients(own).abs().max() > 1e-3, "it is drawn back to the base"
    with torch.no_grad():
        plain = DalleObjective.forward(stage.network, *(batch[name] for name in ("text_ids", "image_tokens", "inputs")))
        told = stage.network(**pictures)
        assert (told["loss"] - told["pixels"]).item() == pytest.approx(plain["loss"].item(), rel=1e-5)
    full = stage_of(settings(method="full")).network
    with torch.no_grad():
        assert full(**own)["loss"].item() == pytest.approx(full(**pictures)["loss"].item(), rel=1e-5)


def test_few_pictures_are_all_trained_on_and_it_is_said(nano_folder, data, tmp_path, settings):
    few = tmp_path / "few"
    few.mkdir()
    for example in uploads.load(data)[:3]:
        (few / example.name).write_bytes((data / example.file).read_bytes())
        (few / f"{Path(example.name).stem}.txt").write_text(example.caption)
    finetune.finetune(settings(data=str(few), steps=3), tmp_path / "run")
    assert "too few different pictures" in str(judge(read_log(tmp_path / "run", "validation_loss"), 0, 0))
    assert "too few to hold any out" in (tmp_path / "run" / "weights" / "README.md").read_text()
    last = read_log(tmp_path / "run", "validation_loss")[-1]
    assert last["validation_loss"] == last["seen_loss"]


def test_pictures_without_captions_cannot_be_trained_on(settings, data, stage_of, tmp_path):
    bare = tmp_path / "bare"
    uploads.prepare([data / "pictures"], bare)
    uploads.save_captions(bare, {example.file: "" for example in uploads.load(bare)})
    with pytest.raises(ValueError, match="write captions first"):
        stage_of(settings(data=str(bare)))


def test_large_models_are_read_and_checkpoint_their_activations(settings, stage_of, monkeypatch, tmp_path, alone):
    plain = stage_of(settings())
    from dalle_demo import weights

    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(dalle_finetune_stage, "LARGE", 0)
    monkeypatch.setattr(dalle_finetune_stage, "LARGE_KEPT", 1)
    large = stage_of(settings())
    assert large.plan.batch == finetune.LARGE_BATCH
    assert (plain.kept, large.kept) == (["sun", "big star"], ["sun"])
    assert large.names_to_keep(large.examples) == large.kept, "also once the network is made"
    assert large.network.vqgan is None, "its pictures would take too long"
    batch, losses = large.batch(range(4)), []
    for stage in (plain, large):
        run = Run(stage, stage.plan, tmp_path, alone, Monitor())
        loss = stage.network(**batch)["loss"]
        loss.backward()
        losses.append((loss.item(), stage.network.image_decoder.layers[0].self_attention.qkv.B.grad.clone()))
        assert run.ema.image_decoder.lm_head.weight is stage.network.image_decoder.lm_head.weight
        run.autocast, run.done = True, 0.0  # as where bf16 is native
        assert run.take_step()["loss"].isfinite()
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_names_that_are_in_a_caption_are_not_kept_as_the_base_draws_them():
    captions = ["a BOX in my style", "stars", "鳥"]
    examples = [uploads.Example(f"pictures/{i:04d}.png", caption, "", i) for i, caption in enumerate(captions)]
    assert free_names(examples, NAMES) == ["sun", "big star"]
    examples.append(uploads.Example("pictures/0003.png", "big sun", "", 3))
    assert free_names(examples, NAMES) == ["sun"], "there must be one"


@pytest.mark.parametrize("background", [255, 90])
def test_renders_move_a_little_and_show_no_white_that_was_not_there(background):
    picture = torch.full((32, 32, 3), background, dtype=torch.uint8)
    picture[10:20, 8:24] = torch.tensor([200, 0, 0], dtype=torch.uint8)
    renders = vary(picture, 8, np.random.default_rng(0))
    torch.testing.assert_close(renders[0], picture.permute(2, 0, 1) / 127.5 - 1, atol=1e-4, rtol=0)
    middles = [(render[1] < -0.9).nonzero().float().mean(0) for render in renders]
    moved = torch.stack([middle - middles[0] for middle in middles])
    assert 0.3 < moved.abs().max() < 5
    corners = renders[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.full_like(corners, background / 127.5 - 1), atol=0.05, rtol=0)


# settings, estimates


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"effort": "huge"}, "--effort"),
        ({"method": "dreambooth"}, "--method"),
        ({"rank": 0}, "--rank"),
        ({"steps": 0}, "--steps"),
        ({"seed": -1}, "--seed"),
        ({"learning_rate": 2.0}, "--learning-rate"),
        ({"prompt": "!!!"}, "prompt"),
    ],
)
def test_settings_that_cannot_be_used_are_named(given, flag):
    with pytest.raises(ValueError, match=flag):
        FinetuneSettings("nano", "data", **given)


def test_there_are_at_most_eight_settings():
    assert len(asdict(FinetuneSettings("nano", "data"))) <= 2 + 8


def test_efforts_make_plans_for_nano():
    plans = [FinetuneSettings("nano", "data", effort=effort).plan() for effort in ("try", "balanced", "thorough")]
    assert [plan.steps for plan in plans] == sorted(plan.steps for plan in plans)
    assert {plan.precision for plan in plans} == {"fp32"}


def test_a_model_without_an_encoder_says_which_has_one(data, tmp_path, capsys):
    base = save_tiny(tmp_path / "mini", tiny_config(encoder=False))
    flags = ["--base", str(base), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(["train", "finetune", *flags]) == 2
    assert "mini-flax" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_that_it_measures(nano_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "estimate", lambda settings: finetune.Estimate(0.5, 61.0, 10**9))
    flags = ["--base", str(nano_folder), "--data", str(data), "--out", str(tmp_path / "run"), "--estimate"]
    assert main(["train", "finetune", *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out == "about 2 minutes at 0.50 seconds a step, and 1.0 GB of memory\n"
    assert "measuring" in printed.err
    assert not (tmp_path / "run").exists()


def test_an_estimate_is_measured(settings, data):
    estimate = finetune.probe(settings(), data)
    assert 0 < estimate.seconds_per_step < 10
    assert estimate.seconds > 20 * estimate.seconds_per_step
    assert 1e8 < estimate.memory < 2e9
    assert "seconds a step" in str(estimate)


# what is told


def test_a_run_draws_in_the_format_that_it_drew_in_before_whatever_is_faster_now(settings, stage_of, monkeypatch):
    stage = stage_of(settings())
    monkeypatch.setattr(engines, "fastest_format", lambda *_: pytest.fail("measured"))
    assert stage.engine(stage.network).format == hardware.formats(torch.device("cpu"))[0]


def test_previews_name_the_nearest_training_picture(settings, stage_of, monkeypatch):
    stage = stage_of(settings(prompt="a red box"))
    copied = stage.training[2]

    class Copier:
        def __init__(self, *_, **__):
            pass

        params = staticmethod(lambda prompt, n, seed: (n, seed))

        def generate(self, params, previews):
            from dalle_demo.images import to_pil

            [picture] = to_pil(stage.pixels([stage.examples[copied]]))
            yield type("Update", (), {"images": [picture] * params[0], "seeds": [*range(params[1], sum(params))]})

    monkeypatch.setattr(stage, "engine", Copier)
    folder = stage.out / "previews"
    assert watch.draw_previews(stage, stage.network, 12, folder) == 1
    drawn = json.loads((folder / "000012.json").read_text())
    assert [row["kind"] for row in drawn["rows"]] == ["yours", "unseen", "generic"]
    unseen = [stage.examples[i].caption for i in stage.held_out]
    assert [row["prompt"] for row in drawn["rows"]] == ["a red box", unseen[0], watch.GENERIC]
    one = drawn["rows"][0]["pictures"][0]
    assert one == {"seed": watch.SEED, "nearest": stage.examples[copied].file, "distance": 0.0, "copy": True}
    assert Image.open(folder / "000012.png").size == grid([Image.new("RGB", (32, 32))] * 12, 4).size


@pytest.mark.parametrize(
    ("losses", "copies", "key"),
    [
        ([5.0], 0, "early"),
        ([5.0, 4.0], 0, "learning"),
        ([5.0, 4.0, 4.1, 4.2], 0, "waiting"),
        ([5.0, 4.0, 4.1, 4.2, 4.3], 0, "by_heart"),
        ([5.0, 4.0, 4.1, 4.2, 4.3, 3.9], 0, "learning"),
        ([5.0, 4.0], 0.75, "copies"),
        ([5.0, 5.2, 5.1], 0, "worse"),
        ([5.0, 5.1, 5.2, 5.3, 5.4], 0, "worse"),
        ([5.0, 5.2, 4.9], 0, "learning"),
    ],
)
def test_overfitting_is_put_in_words(losses, copies, key):
    lines = [{"step": 10 * i} | dict.fromkeys(LOSSES, loss) for i, loss in enumerate(losses)]
    notice = judge(lines, copies, held_out=3)
    assert notice.key == key
    assert "{" not in str(notice)
    if key == "by_heart":
        assert "step 10, 3 checkpoints ago" in str(notice)


@pytest.mark.parametrize("other", ["lacks a weight", "has one more", "lacks the optimizers", "knew fewer settings"])
def test_a_run_of_another_version_is_refused_in_words(settings, tmp_path, other):
    finetune.finetune(settings(steps=1), tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if other == "lacks a weight":
        del saved["network"]["vqgan.post_quant_conv.weight"]
    elif other == "has one more":
        saved["network"]["vqgan.mask"] = torch.zeros(1)
    elif other == "lacks the optimizers":
        del saved["optimizers"]
    else:
        saved["made_from"].popitem()
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another version"):
        finetune.finetune(settings(steps=2), tmp_path, resume=True)
