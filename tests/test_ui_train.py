"""The Train tab's handlers, without a browser: tuned models come, change and go, and the page keeps working."""

import json
import shutil
from types import SimpleNamespace

import gradio as gr
import pytest

from dalle_demo.shelf import Shelf
from dalle_demo.ui.generate import GenerateTab
from dalle_demo.ui.strings import translations
from dalle_demo.ui.train import TrainTab

ME = "my browser's secret"
REQUEST = SimpleNamespace(session_hash="page", headers={})


@pytest.fixture
def page(nano_folder, engine, tmp_path, monkeypatch):
    """Both tabs, whose jobs are in a folder of the test's."""
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    shelf, i18n = Shelf(str(nano_folder), offline=True, load=lambda preset: engine), gr.I18n(**translations())
    with gr.Blocks() as blocks:
        tabs = gr.Tabs()
        generate = GenerateTab(shelf, i18n, blocks)
        train = TrainTab(shelf, i18n, blocks, generate.models, tabs, gr.BrowserState(""))
    train._owners["page"] = ME
    yield SimpleNamespace(blocks=blocks, train=train, models=generate.models, shelf=shelf)
    train.jobs.close()


def tuned(page, folder):
    """A job that is done."""
    job = page.train.jobs._change(page.train.jobs.create(ME), wish="stop", title="Mine")
    run = page.train.jobs.run(job)
    shutil.copytree(folder, run / "weights")
    (run / "state.json").write_text(json.dumps({"state": "done"}))
    return job


def test_a_damaged_model_is_left_out_and_the_others_are_offered(page, nano_folder):
    good, bad, empty = (tuned(page, nano_folder) for _ in range(3))
    (page.train.jobs.run(bad) / "weights" / "config.json").write_text("{")
    shutil.rmtree(page.train.jobs.run(empty) / "weights")
    assert page.train.own(REQUEST) == [f"{good.id}@1"]
    for job in (bad, empty):
        with pytest.raises(gr.Error) as refused:
            page.train.use_in_generate(REQUEST, ME, job.id, 1.0)
        assert str(page.train.jobs.root) not in str(refused.value)


def test_the_choice_follows_a_tuned_model_that_changes_or_goes(page, nano_folder):
    job, models = tuned(page, nano_folder), page.models
    (former,) = page.train.own(REQUEST)
    job = page.train.jobs.set_strength(job, 0.5)
    assert page.train.follow(REQUEST, ME, former)[models.chosen] == f"{job.id}@0.5"
    page.train.press_delete(REQUEST, ME, job.id, False)
    assert page.train.follow(REQUEST, ME, f"{job.id}@0.5")[models.chosen] == page.shelf.home


def test_a_run_can_end_whatever_the_choices_have_become(page):
    ends = [event for event in page.blocks.fns.values() if event.name == "finish"]
    assert ends
    assert not any(event.preprocess for event in ends)
