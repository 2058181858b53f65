"""The Train tab's handlers, without a browser: what a draft needs, and tuned models that come, change and go."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import hub_stub
import pytest
from PIL import Image

from dalle_demo import repos, weights
from dalle_demo.data import uploads
from dalle_demo.images import grid
from dalle_demo.shelf import UNCLIP, Shelf
from dalle_demo.training import finetune
from dalle_demo.training.jobs import State
from dalle_demo.training.watch import DOINGS
from dalle_demo.ui import train_plan, train_views
from dalle_demo.ui.generate import GenerateTab
from dalle_demo.ui.strings import say, translations
from dalle_demo.ui.train import BUTTONS, TrainTab
from dalle_demo.ui.unclip import UnclipTab
from dalle_demo.weights import load_dalle

ME = "my browser's secret"
REQUEST = SimpleNamespace(session_hash="page", headers={})


@pytest.fixture
def page(nano_folder, engine, shipped, tmp_path, monkeypatch):
    """All tabs, whose jobs are in a folder of the test's."""
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    shelf, i18n = Shelf(str(nano_folder), offline=True, load=lambda preset: engine), gr.I18n(**translations())
    with gr.Blocks() as blocks:
        tabs = gr.Tabs()
        generate = GenerateTab(shelf, i18n, blocks)
        unclip = UnclipTab(shelf, i18n, generate, tabs)
        train = TrainTab(shelf, i18n, blocks, generate.models, unclip, tabs, gr.BrowserState(""))
    train._owners["page"] = ME
    yield SimpleNamespace(blocks=blocks, train=train, models=generate.models, unclip=unclip, shelf=shelf)
    train.jobs.close()


def tuned(page, folder):
    """A job that is done."""
    job = page.train.jobs._change(page.train.jobs.create(ME), wish="stop", title="Mine")
    run = page.train.jobs.run(job)
    shutil.copytree(folder, run / "weights")
    (run / "state.json").write_text(json.dumps({"state": "done"}))
    return job


@pytest.fixture
def draft(page, data, monkeypatch):
    """A job with twelve pictures that is not started, and what the page sends of its plan."""
    monkeypatch.setattr(finetune, "probe", lambda settings, data: finetune.Estimate(0.5, 400.0, 10**9))
    monkeypatch.setattr(train_plan, "free_memory", lambda: 2 * 10**9)
    job = page.train.jobs.create(ME)
    shutil.copytree(data, page.train.jobs.data(job))
    return SimpleNamespace(job=job, plan=("balanced", None, page.shelf.home, "lora", False, 16))


@pytest.fixture
def tuned_unclip(page, shipped):
    """A job of the DALL-E 2 engine that is done, and its name on the shelf."""
    job = tuned(page, shipped / "unclip-nano")
    (page.train.jobs.run(job) / "settings.json").write_text(json.dumps({"base": UNCLIP}))
    return SimpleNamespace(job=job, name=f"{job.id}@1")


def start(page, draft, **changed):
    values = {"consent": True, "title": "Mine", "steps": "", "rate": "", "seed": None} | changed
    names = ("effort", "steps", "base", "method", "text_encoder", "rank")
    values = dict(zip(names, draft.plan, strict=True)) | {"prompt": ""} | values
    return page.train.begin(REQUEST, ME, draft.job.id, **values)


def measure(page, draft) -> list[dict]:
    return list(page.train.estimate(REQUEST, ME, draft.job.id, True, *draft.plan))


def test_training_starts_once_its_estimate_is_known(page, draft):
    tab = page.train
    before = tab.show_plan(REQUEST, ME, draft.job.id, True, *draft.plan)
    assert (before[tab.start].interactive, before[tab.plan]) == (False, say("measuring", "en"))
    with pytest.raises(gr.Error, match="once it is measured"):
        start(page, draft)
    *_, after = measure(page, draft)
    assert after[tab.start].interactive
    assert after[tab.plan] == "About 7 min here, 300 steps, 1.0 GB of memory."
    assert len(measure(page, draft)) == 1, "measured once"
    (other,) = [tab.show_plan(REQUEST, ME, draft.job.id, True, *draft.plan[:-1], 64)]
    assert not other[tab.start].interactive, "other settings are measured anew"
    start(page, draft)
    job = tab.jobs.get(ME, draft.job.id)
    assert job.expected == 400
    assert tab.jobs.settings(job)["base"] == tab.shelf.trainable()[page.shelf.home]
    assert not {"steps", "learning_rate", "seed"} & tab.jobs.settings(job).keys()
    assert "About 7 min in all" in train_views.progress_of(State("preparing"), None, job.expected, False, "en")


def test_what_cannot_be_measured_says_why_and_is_tried_again(page, draft, monkeypatch):
    def refuse(settings, data):
        raise ValueError("there is <no> memory")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "probe", refuse)
        *_, failed = measure(page, draft)
    assert failed[page.train.plan] == "It cannot be trained: there is &lt;no&gt; memory"
    assert not failed[page.train.start].interactive
    *_, after = measure(page, draft)
    assert after[page.train.start].interactive


def test_training_that_does_not_fit_the_memory_is_refused(page, draft, monkeypatch):
    measure(page, draft)
    monkeypatch.setattr(train_plan, "free_memory", lambda: 8 * 10**8)
    with pytest.raises(gr.Error, match=r"it needs 1.0 GB of memory, and 800 MB are free"):
        start(page, draft)
    monkeypatch.setattr(page.train.jobs, "running", lambda: "another, which is over by then")
    monkeypatch.setattr(train_plan, "memory_limit", lambda: 4 * 10**9)
    monkeypatch.setattr(page.train.jobs, "_keep", lambda: None)
    start(page, draft)
    assert page.train.jobs.get(ME, draft.job.id).wish == "run"


def test_numbers_that_are_left_out_are_empty(page):
    for box in (page.train.steps, page.train.rate, page.train.seed):
        assert box.get_config()["value"] == "", "gradio's page makes a 0 of null"
        assert not box.preprocess("")


def test_words_that_the_base_does_not_know_are_told_while_captions_are_typed(page, draft):
    folder = page.train.jobs.data(draft.job)
    uploads.save_captions(folder, {"pictures/0000.png": "a red zorkq & кот"})
    shown = page.train.show_plan(REQUEST, ME, draft.job.id, True, *draft.plan)[page.train.words]
    assert "zorkq, кот" in shown
    assert "red," not in shown


def test_a_draft_is_shown_and_not_replaced_by_a_new_one(page, draft, data, tmp_path):
    tab = page.train
    assert tab.renew(REQUEST, ME)[tab.viewed] == draft.job.id
    before = uploads.load(tab.jobs.data(draft.job))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    *_, told = tab.prepare(REQUEST, ME, "", [str(tmp_path / "other.png")])  # of a tab that does not show it
    assert told[tab.viewed] == draft.job.id
    assert say("draft_kept", "en") in told[tab.report]
    assert uploads.load(tab.jobs.data(draft.job)) == before
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    list(tab.prepare(REQUEST, ME, draft.job.id, [str(tmp_path / "other.png")]))
    assert len(uploads.load(tab.jobs.data(draft.job))) == 1


def test_a_caption_that_comes_after_the_start_is_refused(page, draft):
    measure(page, draft)
    start(page, draft)
    typed = SimpleNamespace(file="pictures/0000.png", caption="late")
    with pytest.raises(gr.Error, match="started already"):
        page.train.save_caption(REQUEST, ME, draft.job.id, typed)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("key", DOINGS)
def test_what_is_done_before_the_first_step_is_shown(key, language):
    state = State("preparing", steps=20, doing=(key, {"done": 3, "total": 12}))
    shown = train_views.progress_of(state, None, None, False, language)
    assert say(f"doing_{key}", language, done=3, total=12) in shown
    assert '<progress value="3" max="12">' in shown
    assert "20" not in shown


def test_what_gets_ready_can_be_stopped_and_not_paused(page, draft):
    shown = {
        state: page.train._turned(REQUEST, ME, draft.job, state, None)
        for state in ("preparing", "running", "pausing", "done")
    }
    offered = {
        state: {name for name in BUTTONS if turned[page.train.buttons[name]].visible} for state, turned in shown.items()
    }
    assert offered["preparing"] == {"stop_training"}
    assert offered["running"] == {"pause", "save_now", "stop_training"}
    assert offered["pausing"] == {"stop_training"}
    assert offered["done"] == set()
    assert shown["preparing"][page.train.buttons["stop_training"]].value == "Stop"


def test_generate_says_that_a_training_takes_its_share(page, monkeypatch):
    assert not page.models.noticed(REQUEST).visible
    monkeypatch.setattr(page.train.jobs, "running", lambda: "somebody's")
    notice = page.models.noticed(REQUEST)
    assert (notice.visible, notice.value) == (True, say("while_training", "en"))


def test_the_menu_says_who_trained_a_model_and_no_licence_that_there_is_not(page, nano_folder):
    tuned(page, nano_folder)
    *public, mine = [label for label, _ in page.models.choices(REQUEST)]
    assert all(label.endswith("licence in its card") for label in public)
    assert mine.startswith("Mine: ")
    assert mine.endswith("trained by you")


@pytest.mark.parametrize(("there", "key"), [(True, "base_not_drawn"), (False, "base_gone")])
def test_a_base_that_cannot_be_drawn_is_not_called_gone(page, nano_folder, monkeypatch, there, key):
    job = tuned(page, nano_folder)
    (page.train.jobs.run(job) / "settings.json").write_text(json.dumps({"base": "mini-flax"}))
    monkeypatch.setattr(page.shelf, "trainable", lambda: {"mini-flax": "mini-flax"} if there else {})
    monkeypatch.setattr(page.train, "_draw", lambda model, prompt, stop: [model])
    *_, (told, _, before, after) = page.train.compare(REQUEST, ME, job.id, "a red box", 1.0)
    assert told == say(key, "en", base="mini-flax")
    assert (before, after) == ([], [f"{job.id}@1"])


def test_pictures_above_what_is_made_of_them_are_shown_in_pairs(tmp_path):
    grid([Image.new("RGB", (32, 32), "red")] * 10, 5).save(tmp_path / "reconstruction.png")
    assert train_views.reconstruction_of(tmp_path / "reconstruction.png", "en").count("<img") == 5


def test_a_model_is_pushed_with_the_visitors_token_which_is_kept_nowhere(page, nano_folder, tmp_path, monkeypatch):
    token = "hf_visitors_own_secret"
    job = tuned(page, nano_folder)
    left = page.train.jobs.weights(job)
    (left / "README.md").write_text("---\nlicense: other\nlicense_name: fill-in\n---\n# Mine\n")
    with hub_stub.serving(tmp_path / "hub", monkeypatch) as hub:
        hub.token = token
        (sending, _), (told, box) = page.train.press_push(REQUEST, ME, job.id, "tester/mine", token, True, "cc0-1.0")
        assert sending == "Sending it to tester/mine…"
        assert told == f"It is at {hub.endpoint}/tester/mine"
        assert box == ""
        assert hub.repos["tester/mine"].private
        assert b"license_name: cc0-1.0" in hub.repos["tester/mine"].commits[hub.repos["tester/mine"].main]["README.md"]
        folders = [page.train.jobs.root, tmp_path, Path.home() / ".cache" / "huggingface"]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if token.encode() in path.read_bytes()]
        monkeypatch.setenv("HF_TOKEN", token)
        back = repos.pull("tester/mine")
        assert load_dalle(str(back)).sha256 == load_dalle(str(nano_folder)).sha256


def test_who_may_not_publish_hears_what_a_visitor_can_do(page, nano_folder, tmp_path, monkeypatch):
    job = tuned(page, nano_folder)
    (page.train.jobs.weights(job) / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with hub_stub.serving(tmp_path / "hub", monkeypatch) as hub:
        hub.token = "another one"
        *_, (told, box) = page.train.press_push(REQUEST, ME, job.id, "tester/mine", "hf_mine", False, "")
    assert told == say("push_failed", "en", reason=say("push_refused", "en"))
    assert box == ""


def test_no_more_is_compared_for_a_page_that_is_closed(page, tuned_unclip):
    steps = page.train.compare(REQUEST, ME, tuned_unclip.job.id, "a red box", 1.0)
    next(steps)
    page.train.leave(REQUEST)
    assert list(steps)[-1][2:] == ([], [])
    assert not page.train._comparing
    assert page.train.own_unclips(REQUEST) == [tuned_unclip.name], "as when a connection broke for a moment"


def test_a_page_that_has_forgotten_what_it_shows_shows_the_newest(page, tuned_unclip):
    shown = page.train.poll(REQUEST, ME, "", {}, False, False)
    assert shown[page.train.viewed] == tuned_unclip.job.id


def test_a_damaged_model_is_left_out_and_the_others_are_offered(page, nano_folder):
    good, bad, empty = (tuned(page, nano_folder) for _ in range(3))
    (page.train.jobs.run(bad) / "weights" / "config.json").write_text("{")
    shutil.rmtree(page.train.jobs.run(empty) / "weights")
    assert page.train.own(REQUEST) == [f"{good.id}@1"]
    for job in (bad, empty):
        with pytest.raises(gr.Error) as refused:
            page.train.use_model(REQUEST, ME, job.id, 1.0)
        assert str(page.train.jobs.root) not in str(refused.value)


def test_the_choice_follows_a_tuned_model_that_changes_or_goes(page, nano_folder):
    job, models = tuned(page, nano_folder), page.models
    (former,) = page.train.own(REQUEST)
    job = page.train.jobs.set_strength(job, 0.5)
    assert page.train.follow(REQUEST, ME, former, UNCLIP)[models.chosen] == f"{job.id}@0.5"
    page.train.press_delete(REQUEST, ME, job.id)
    assert page.train.follow(REQUEST, ME, f"{job.id}@0.5", UNCLIP)[models.chosen] == page.shelf.home


@pytest.mark.parametrize(("base", "shown"), [(UNCLIP, False), ("tiny", True)])
def test_what_a_dalle_2_does_not_know_is_hidden_and_not_sent(page, draft, base, shown, monkeypatch):
    given = []
    monkeypatch.setattr(
        finetune, "probe", lambda settings, data: (given.append(settings), finetune.Estimate(0.5, 400.0, 10**9))[1]
    )
    monkeypatch.setattr(page.train.jobs, "_keep", lambda: None)
    assert [control.visible for control in page.train.fit(base)] == [shown, shown]
    draft.plan = ("balanced", None, base, "lora", True, 16)
    measure(page, draft)
    start(page, draft)
    settings = page.train.jobs.settings(page.train.jobs.get(ME, draft.job.id))
    assert ({"method", "rank", "text_encoder"} <= settings.keys()) is shown
    assert (given[0].method, given[0].text_encoder) == (("lora", True) if shown else ("full", False))


def test_words_that_clip_does_not_know_are_told(page, draft):
    uploads.save_captions(page.train.jobs.data(draft.job), {"pictures/0000.png": "a red zorkq & кот"})
    draft.plan = ("balanced", None, UNCLIP, "lora", False, 16)
    assert "кот" in page.train.show_plan(REQUEST, ME, draft.job.id, True, *draft.plan)[page.train.words]


def test_a_tuned_dalle_2_draws_in_its_own_tab_and_for_its_owner_alone(page, tuned_unclip):
    stranger = SimpleNamespace(session_hash="another", headers={})
    tab, job = page.train, tuned_unclip.job
    shown = tab._turned(REQUEST, ME, job, "done", tab.jobs.weights(job))
    assert shown[tab.use].value == "Use in DALL·E 2"
    assert not shown[tab.strength].visible
    used = tab.use_model(REQUEST, ME, job.id, 1.0)
    assert used[tab.tabs].selected == "unclip"
    assert page.models.model not in used
    model = used[page.unclip.model]
    assert (model.value, model.visible) == (tuned_unclip.name, True)
    assert [title for title, _ in model.choices] == [UNCLIP, "Mine"], "the way back is there"
    assert page.unclip.offer(stranger, tuned_unclip.name).choices == [(UNCLIP, UNCLIP)]
    assert tuned_unclip.name not in {name for _, name in page.models.choices(REQUEST)}
    assert (tab.own(REQUEST), tab.own_unclips(REQUEST)) == ([], [tuned_unclip.name])
    with pytest.raises(gr.Error):
        tab.use_model(stranger, "another browser's secret", job.id, 1.0)


def test_both_dalle_2_models_are_compared(page, tuned_unclip):
    *_, (told, _, before, after) = page.train.compare(REQUEST, ME, tuned_unclip.job.id, "a red box", 1.0)
    assert told == say("compared", "en", seed=1, base=UNCLIP)
    assert [picture.tobytes() for picture in before] == [picture.tobytes() for picture in after], "the same weights"
    assert len(before) == 4


def test_the_choice_of_a_dalle_2_follows_its_name_and_its_end(page, tuned_unclip):
    tab, name = page.train, tuned_unclip.name
    tab.own_unclips(REQUEST)
    assert page.shelf.unclip(name).name == "Mine"
    tab.press_rename(REQUEST, ME, tuned_unclip.job.id, "Ours")
    followed = tab.follow(REQUEST, ME, page.shelf.home, name)[page.unclip.model]
    assert (followed.value, followed.choices[1]) == (name, ("Ours", name))
    assert page.shelf.unclip(name).name == "Ours"
    tab.press_delete(REQUEST, ME, tuned_unclip.job.id)
    followed = tab.follow(REQUEST, ME, page.shelf.home, name)[page.unclip.model]
    assert (followed.value, followed.visible) == (UNCLIP, False)


def test_a_run_can_end_whatever_the_choices_have_become(page):
    ends = [event for event in page.blocks.fns.values() if event.name == "finish"]
    assert ends
    assert not any(event.preprocess for event in ends)
