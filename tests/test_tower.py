"""A finished CLIP's image tower trained on: texts keep their embeddings, and drawings come to their names."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unclip_config
from train_tiny import make_plan

from dalle_demo.matching import embed_texts
from dalle_demo.training import tower_stage
from dalle_demo.training.loop import train
from dalle_demo.training.tower_stage import NO_NAME, TowerStage
from dalle_demo.training.unclip_stages import PriorStage, View, render_views
from dalle_demo.weights import WeightsError, assemble_unclip, clip_hashes, load_clip, load_unclip

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = tiny_unclip_config()


@pytest.fixture
def stage_of(data_folder, shipped):
    """Maker of the stage."""
    return lambda workers: TowerStage(data_folder, CONFIG, shipped / "clip-nano", seed=1)


@pytest.fixture
def trained(stage_of, tmp_path):
    """Folder of a run of 200 steps."""
    train(stage_of, dataclasses.replace(make_plan(200), batch=16), tmp_path / "run")
    return tmp_path / "run"


def test_samples_do_not_depend_on_how_they_are_grouped(stage_of, alone):
    stage = stage_of(alone)
    whole, halves = stage.batch(range(8, 24)), [stage.batch(range(8, 12)), stage.batch(range(12, 24))]
    for key in ("pixels", "names"):
        torch.testing.assert_close(whole[key], torch.cat([half[key] for half in halves]), atol=1e-5, rtol=1e-5)


def test_names_are_those_of_single_drawings_and_scenes_are_left_whole(stage_of, alone):
    stage = stage_of(alone)
    views, rngs = stage.views(range(64))
    plain = stage.paired(views, rngs)["pixels"]
    batch = stage.batch(range(64))
    for i, view in enumerate(views):
        row = stage.pairs.rows[view.index]
        expected = [names.index(row[key]) for names, key in zip(stage.names, ("name", "name_zh"), strict=True)]
        assert batch["names"][i].tolist() == ([NO_NAME, NO_NAME] if view.scene else expected)
        if view.scene:
            assert torch.equal(batch["pixels"][i], plain[i])
    hidden = [not torch.equal(batch["pixels"][i], plain[i]) for i, view in enumerate(views) if not view.scene]
    assert 0.2 < np.mean(hidden) < 0.8


def test_only_what_means_the_same_is_mirrored(stage_of, alone, monkeypatch):
    stage = stage_of(alone)
    monkeypatch.setattr(tower_stage, "ERASED_SHARE", 0)
    pixels = torch.rand(3, 8, 8)
    for group, mirrored in (("objects", False), ("food-drink", True)):
        monkeypatch.setitem(stage.pairs.rows[0], "group", group)
        shown = [stage._disguised(pixels, View(0), np.random.default_rng(i)) for i in range(12)]
        assert any(torch.equal(one, pixels.flip(-1)) for one in shown) == mirrored
        assert any(torch.equal(one, pixels) for one in shown)


def test_a_batch_of_scenes_alone_has_a_loss(stage_of, alone):
    stage = stage_of(alone)
    batch = stage.batch(range(4))
    losses = stage.network(**batch | {"names": torch.full((4, 2), NO_NAME)})
    assert losses["names"] == 0
    assert torch.isfinite(losses["loss"])


def test_texts_keep_their_embeddings_and_drawings_come_to_their_names(trained, shipped, stage_of, alone):
    before, after = load_clip(str(shipped / "clip-nano")), load_clip(str(trained / "weights"))
    stage = stage_of(alone)
    with torch.inference_mode():
        captions = ["a red box", "两个绿色盒子", "flat pink box"]
        torch.testing.assert_close(embed_texts(after, captions), embed_texts(before, captions), atol=2e-3, rtol=0)
        names = embed_texts(before, stage.names[0])
        pixels = render_views(stage.scenes, [View(i) for i in stage.training])
        own = torch.tensor([stage.names[0].index(stage.pairs.rows[i]["name"]) for i in stage.training])
        near = [model.clip.encode_image(F.interpolate(pixels, 32)) @ names.T for model in (before, after)]
    margins = [(cosines.gather(1, own[:, None])[:, 0] - cosines.mean(1)).mean() for cosines in near]
    assert margins[1] > margins[0] + 0.015
    assert not torch.equal(after.clip.image_tower.out.weight, before.clip.image_tower.out.weight)


def test_what_keeps_embeddings_keeps_them(stage_of, tmp_path, monkeypatch):
    """The higher its weight, the nearer they are to what they were."""
    kept = []
    for weight in (0.0, 50.0):
        monkeypatch.setattr(tower_stage, "KEPT_WEIGHT", weight)
        out = tmp_path / str(weight)
        train(stage_of, dataclasses.replace(make_plan(60), batch=16), out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        kept.append(next(line["validation_kept"] for line in reversed(lines) if "validation_kept" in line))
    assert kept[0] < kept[1]
    assert kept[1] > 0.9


def test_models_of_the_clip_before_go_on_with_it_and_no_others(trained, shipped, data_folder, tmp_path, alone):
    """A DALL-E 2 model names its CLIP by hash; a tower that is trained on answers to those before it, too."""
    home = tmp_path / "served"
    home.mkdir()
    shutil.copytree(trained / "weights", home / "clip-nano")
    (home / "unclip-nano").symlink_to(shipped / "unclip-nano")
    hashes = clip_hashes(trained / "weights")
    assert hashes[1:] == clip_hashes(shipped / "clip-nano")
    assert load_unclip(str(home / "unclip-nano")).clip.sha256 == hashes[0]
    prior = tmp_path / "prior"
    train(lambda workers: PriorStage(data_folder, CONFIG, shipped / "clip-nano", prior, workers), make_plan(1), prior)
    both = [prior / "weights", shipped / "unclip-nano"]
    assemble_unclip(*both, home / "clip-nano", home / "made", {})
    config = home / "clip-nano" / "config.json"
    meta = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in meta.items() if key != "continues"}))
    with pytest.raises(WeightsError, match="was written for a clip-nano"):
        load_unclip(str(home / "unclip-nano"))
    with pytest.raises(WeightsError, match="was trained with another CLIP"):
        assemble_unclip(*both, home / "clip-nano", home / "again", {})
