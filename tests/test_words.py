"""Nouns without pictures: which are read, and that a text encoder learns what to show for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from train_tiny import make_plan

from dalle_demo.data import words
from dalle_demo.matching import embed_texts
from dalle_demo.training import stages, words_stage
from dalle_demo.training.loop import train
from dalle_demo.training.teacher import nearest_captions
from dalle_demo.training.words_stage import WordsStage
from dalle_demo.weights import load_clip

pytestmark = pytest.mark.usefixtures("one_thread")
NPM = Path(__file__).parent / "fixtures" / "npm"
NOUNS = ("scarlet", "crimson", "navy blue", "emerald", "charcoal", "rose", "container", "tyrannosaurus")


@pytest.fixture
def stage_of(data_folder, shipped, tmp_path):
    """Maker of the stage on a few nouns."""
    (tmp_path / "nouns.txt").write_text("".join(f"{noun}\n" for noun in NOUNS), encoding="utf-8")
    return lambda workers: WordsStage(
        data_folder, shipped / "clip-nano", tmp_path / "nouns.txt", tmp_path, workers, seed=1
    )


def test_nouns_name_what_can_be_drawn(tmp_path):
    """No abstractions, places and names of persons; the spelling with signs is left out."""
    assert words.build(tmp_path / "nouns.txt", NPM) == 15
    found = (tmp_path / "nouns.txt").read_text(encoding="utf-8").splitlines()
    assert found == sorted(found)
    assert {"puppy", "toy poodle", "automobile", "thunderstorm", "pumpkin vine"} <= set(found)
    assert not {"entity", "Paris", "jack-o'-lantern", "City of Light", "genus Paris"} & set(found)


def test_samples_do_not_depend_on_how_they_are_grouped(stage_of, alone):
    stage = stage_of(alone)
    whole, halves = stage.batch(range(8, 24)), [stage.batch(range(8, 12)), stage.batch(range(12, 24))]
    torch.testing.assert_close(whole["target"], torch.cat([half["target"] for half in halves]), atol=1e-5, rtol=1e-5)


def test_captions_of_scenes_are_to_stay_as_well(stage_of, shipped, alone):
    """Without them counts and relations were forgotten."""
    stage = stage_of(alone)
    drawn, draw = [], stage.scenes.draw
    stage.scenes.draw = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    targets = stage.batch(range(64))["target"]
    assert len(drawn) > 5
    with torch.inference_mode():
        expected = embed_texts(load_clip(str(shipped / "clip-nano")), [scene.caption for scene in drawn])
    assert torch.cdist(expected, targets).amin(1).max() < 1e-3


def test_shares_of_the_nearest_captions():
    captions = torch.eye(3)
    nouns = torch.tensor([[0.8, 0.6, 0.0], [0.4, 0.4, 0.4]])
    places, weights = nearest_captions(nouns, captions)
    assert places[0].tolist() == [0, 1, 2]
    expected = np.exp(20 * np.array([0.8, 0.6, 0.0]))
    np.testing.assert_allclose(weights[0], expected / expected.sum(), rtol=1e-4)
    assert weights[1].isnan().all()  # nothing is near


def test_nouns_come_to_what_their_captions_show_and_captions_stay(stage_of, shipped, tmp_path, monkeypatch, alone):
    """The real teacher knows that scarlet is a red; the clip part, with which a DALL-E 2 model is checked, stays."""
    monkeypatch.setattr(words_stage, "HELD_OUT_PHRASES", 0)
    stage = stage_of(alone)
    assert "tyrannosaurus" not in stage.nouns.words  # nothing in the data is like it
    train(stage_of, make_plan(80), tmp_path / "run")
    before, after = load_clip(str(shipped / "clip-nano")), load_clip(str(tmp_path / "run" / "weights"))
    assert after.sha256 == before.sha256
    captions = [f"{style} {colour} box" for style in ("flat", "bold") for colour in ("red", "green", "pink")]
    with torch.inference_mode():
        wanted = torch.stack([stage._between(i, 0) for i in range(len(stage.nouns))])
        near = [(embed_texts(clip, stage.nouns.words) * wanted).sum(1).mean() for clip in (before, after)]
        kept = (embed_texts(before, captions) * embed_texts(after, captions)).sum(1)
    assert near[1] > near[0] + 0.3 * (1 - near[0])
    assert kept.min() > 0.9


def test_an_image_decoder_learns_nouns_with_drawings_of_names_near_to_them(
    data_folder, nano_folder, tmp_path, alone, monkeypatch
):
    (tmp_path / "nouns.txt").write_text("crimson box\nruby box\ntyrannosaurus\n", encoding="utf-8")
    monkeypatch.setattr(stages.pairs_data, "unseen_words", lambda pairs: {"ruby box"})
    monkeypatch.setattr(stages, "MOVED_SHARE", 0.0)

    def make(words: Path | None) -> stages.DalleStage:
        return stages.DalleStage(data_folder, tiny_config(), nano_folder, nano_folder, tmp_path, alone, words=words)

    stage = make(tmp_path / "nouns.txt")
    assert stage.nouns.words == ["crimson box"]
    drawn = [stage._sample(stages.sample_rng(1, i), 0) for i in range(300)]
    beside = [tokens for caption, tokens, _ in drawn if "crimson" in caption]
    assert 20 < len(beside) < 60  # a fifth of those that are no scenes
    tokens_of = {name: {tuple(stage.tokens[i]) for i in rows} for name, rows in stage.drawings.items()}
    shown = {name: sum(tuple(tokens) in of for tokens in beside) for name, of in tokens_of.items()}
    assert sum(shown.values()) >= len(beside)  # drawings as they are
    assert max(shown, key=shown.get) == "red box"
    assert make(None).made_from["--words"] == ""
