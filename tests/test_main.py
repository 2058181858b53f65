"""The command line: files with telling names, one bad prompt does not stop the others, any picture can be repeated."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny, tiny_config

from dalle_demo import engines, shelf, weights
from dalle_demo.__main__ import main, parser
from dalle_demo.checkpoints import read_config, stored_hash
from dalle_demo.config import CLIP_PRESET, MAX_SEED, GenerateParams, UnclipParams
from dalle_demo.images import grid, read_request

ROOT = Path(__file__).resolve().parent.parent
NUMERIC = [spec for spec in dataclasses.fields(GenerateParams) if spec.name != "prompt"]
UNCLIP_NUMERIC = [spec for spec in dataclasses.fields(UnclipParams) if spec.name != "prompt"]


@pytest.fixture
def real_loading() -> None:
    """Ask for this to load weights instead of sharing an engine."""


@pytest.fixture(autouse=True)
def one_engine(engine, monkeypatch, request):
    """Commands share the session's engine, except where loading is what is tested."""
    if "real_loading" not in request.fixturenames:
        monkeypatch.setattr(engines.DalleEngine, "load", classmethod(lambda cls, *_, **__: engine))


def generate(out: Path, *arguments: str) -> list[str]:
    """Names of the files that a successful `generate` leaves in `out`."""
    assert main(["generate", *arguments, "--out", str(out)]) == 0
    return sorted(path.name for path in out.iterdir())


def test_files_are_named_by_line_prompt_and_seed(tmp_path, capsys):
    names = generate(tmp_path / "new" / "out", "A red apple!", "--n", "2", "--seed", "9")
    assert names == ["001-a-red-apple-10.png", "001-a-red-apple-9.png"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / "new" / "out" / f"001-a-red-apple-{seed}.png") for seed in (9, 10)]


def test_files_tell_how_they_were_made(tmp_path, engine):
    generate(tmp_path, "一只小狗 🍕", "--n", "2", "--seed", "9", "--temperature", "0.5", "--top-k", "7")
    for seed in (9, 10):
        (path,) = tmp_path.glob(f"001-一只小狗-{seed}.png")
        request, origin = read_request(path)
        expected = {
            "prompt": "一只小狗 🍕",
            "n": 1,
            "seed": seed,
            "temperature": 0.5,
            "top_k": 7,
            "guidance_scale": 2.0,
        }
        assert expected.items() <= request.items()  # guidance 2 is the default of this model
        assert origin.keys() == engine.origin.keys()
        assert (origin["model"], origin["steps"]) == (engine.name, 16)


@pytest.mark.parametrize("prompt", ["🍕🍕", "../../etc/passwd", "a/b\\c:d*e", "x" * 300, "CON", "..."])
def test_no_prompt_escapes_its_folder(tmp_path, prompt):
    out = tmp_path / "out"
    main(["generate", prompt, "--n", "1", "--seed", "1", "--out", str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    for path in out.iterdir():
        assert path.is_file()
        assert len(path.name.encode()) < 255


def test_blank_seed_is_written_down(tmp_path):
    (name,) = generate(tmp_path, "a cat", "--n", "1")
    assert name == f"001-a-cat-{read_request(tmp_path / name)[0]['seed']}.png"


def test_prompts_from_a_file(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\n   \n  a black cat  \r\n一只小狗", encoding="utf-8")
    names = generate(tmp_path / "out", "--prompts", str(prompts), "--n", "1", "--seed", "3")
    assert names == ["001-a-red-apple-3.png", "004-a-black-cat-3.png", "005-一只小狗-3.png"]


def test_prompts_from_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red apple\n\na cat\n"))
    names = generate(tmp_path, "--prompts", "-", "--n", "1", "--seed", "3")
    assert names == ["001-a-red-apple-3.png", "003-a-cat-3.png"]


def test_a_bad_line_is_reported_and_the_others_are_drawn(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n!!!\n" + "y" * 2000 + "\na cat\n")
    status = main(["generate", "--prompts", str(prompts), "--n", "1", "--seed", "3", "--out", str(tmp_path / "out")])
    assert status == 2
    assert sorted(path.name[:3] for path in (tmp_path / "out").iterdir()) == ["001", "004"]
    errors = capsys.readouterr().err.splitlines()
    assert [line[:15] for line in errors] == ["line 2: prompt:", "line 3: prompt:"]


def test_a_cut_prompt_is_drawn_with_a_notice(tmp_path, capsys):
    generate(tmp_path, "zyxwvut " * 20, "--n", "1")
    assert capsys.readouterr().err.startswith("This model left out")


def test_the_only_prompt_has_no_line(tmp_path, capsys):
    assert main(["generate", "!!!", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: prompt: ")


def test_grid_is_one_more_file(tmp_path):
    names = generate(tmp_path, "a cat", "--n", "3", "--seed", "5", "--grid")
    assert names == ["001-a-cat-5-grid.png", "001-a-cat-5.png", "001-a-cat-6.png", "001-a-cat-7.png"]
    pictures = [Image.open(tmp_path / f"001-a-cat-{seed}.png") for seed in (5, 6, 7)]
    with Image.open(tmp_path / names[0]) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(grid(pictures)))
    request, _ = read_request(tmp_path / names[0])
    assert (request["n"], request["seed"]) == (3, 5)


def test_again_makes_the_identical_file(tmp_path):
    settings = ["--temperature", "0.7", "--top-p", "0.8", "--guidance-scale", "3"]
    names = generate(tmp_path / "first", "a red apple 🍕", "--n", "3", *settings)
    for name in names:
        again = generate(tmp_path / name, "--again", str(tmp_path / "first" / name))
        assert again == [name]
        assert (tmp_path / name / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_again_with_a_flag_changes_only_that(tmp_path):
    (name,) = generate(tmp_path / "first", "a cat", "--n", "1", "--seed", "4", "--top-k", "9")
    (again,) = generate(tmp_path / "again", "--again", str(tmp_path / "first" / name), "--seed", "5")
    old, new = read_request(tmp_path / "first" / name)[0], read_request(tmp_path / "again" / again)[0]
    assert new == old | {"seed": 5}


def test_again_of_no_picture(tmp_path, capsys):
    assert main(["generate", "--again", str(tmp_path / "nowhere.png"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_again_of_a_foreign_picture(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    assert main(["generate", "--again", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 2
    assert "photo.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "request_", [{"prompt": "a cat", "style": "x"}, {"seed": 3}, {}, {"prompt": "cat.png", "operation": "blend"}]
)
def test_again_of_another_version(tmp_path, capsys, request_):
    """Settings that this version does not know, or lacks, are one sentence and no traceback."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("dalle_demo", json.dumps({"model": "nano", "request": request_}))
    Image.new("RGB", (4, 4)).save(tmp_path / "later.png", pnginfo=chunks)
    assert main(["generate", "--again", str(tmp_path / "later.png"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error
    assert ("more than a prompt" in error) == ("operation" in request_)


@pytest.mark.parametrize(
    "arguments",
    [[], ["a cat", "--prompts", "-"], ["a cat", "--again", "x.png"], ["--prompts", "-", "--again", "x.png"]],
)
def test_one_source_of_prompts(tmp_path, capsys, arguments):
    assert main(["generate", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_again_of_a_grid_draws_its_pictures_and_the_grid(tmp_path):
    names = generate(tmp_path / "first", "a cat", "--n", "3", "--seed", "5", "--grid")
    assert generate(tmp_path / "again", "--again", str(tmp_path / "first" / names[0])) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize("path", ["no such file.txt", "."])
def test_unreadable_prompts(tmp_path, capsys, path):
    assert main(["generate", "--prompts", str(tmp_path / path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "Errno" not in error


def test_pictures_need_a_folder(tmp_path, capsys):
    """Said before a model is loaded."""
    (tmp_path / "file").touch()
    assert main(["generate", "a cat", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out: {tmp_path / 'file'} is a file")
    assert main(["generate", "a cat", "--out", str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file' / 'below'}: ")


@pytest.mark.usefixtures("real_loading")
def test_unknown_preset(tmp_path, capsys):
    assert main(["generate", "a cat", "--preset", "gigantic", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in ("gigantic", "nano", "mini", "mega", "weights list"):
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("real_loading")
def test_draws_from_a_folder_of_weights(tmp_path, nano_folder):
    assert generate(tmp_path, "a cat", "--preset", str(nano_folder), "--n", "1", "--seed", "2") == ["001-a-cat-2.png"]


@pytest.mark.parametrize("spec", NUMERIC, ids=lambda spec: spec.name)
def test_every_setting_has_a_flag_that_arrives(tmp_path, engine, monkeypatch, spec):
    values = {
        "n": 3, "seed": 77, "temperature": 0.35, "top_k": 12, "top_p": 0.55, "guidance_scale": 4.5, "candidates": 5,
    }  # fmt: skip
    assert set(values) == {spec.name for spec in NUMERIC}, "a new setting: give it a value here"
    seen = []
    original = engine.generate
    last = dataclasses.replace(GenerateParams("a cat", seed=77), n=3)
    monkeypatch.setattr(engine, "generate", lambda params, **rest: seen.append(params) or original(last, **rest))
    flag = "--" + spec.name.replace("_", "-")
    generate(tmp_path, "a cat", flag, str(values[spec.name]), "--seed", "77")
    assert getattr(seen[0], spec.name) == values[spec.name]
    help_text = parser()._subparsers._group_actions[0].choices["generate"].format_help()
    assert flag in help_text
    described = " ".join(help_text.split(f"{flag} ")[-1].split())
    assert f"From {spec.metadata['low']:g} to " in described
    assert "default " in described


def test_help_tells_the_defaults_of_each_preset():
    help_text = " ".join(parser()._subparsers._group_actions[0].choices["generate"].format_help().split())
    assert "From 0.05 to 2; default 1, nano 0.5." in help_text
    assert "From 1 to 16; default 4, mini 1, mega 1." in help_text
    assert "From 0 to 2147483647; default random." in help_text


@pytest.fixture
def both(shipped, monkeypatch, real_loading) -> Path:
    """Where unclip-nano and clip-nano are tiny ones."""
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    return shipped


def test_draws_with_a_dalle_2(tmp_path, both):
    arguments = ["--preset", "unclip-nano", "--n", "2", "--seed", "9", "--truncation", "0.5", "--grid"]
    names = generate(tmp_path / "first", "一只小狗", *arguments)
    assert names == ["001-一只小狗-10.png", "001-一只小狗-9-grid.png", "001-一只小狗-9.png"]
    request, origin = read_request(tmp_path / "first" / names[0])
    expected = {"prompt": "一只小狗", "n": 1, "seed": 10, "truncation": 0.5, "guidance_scale": 1.5, "candidates": 2}
    assert request == expected  # guidance 1.5 is the default of this model
    assert (origin["model"], origin["steps"], origin["format"]) == ("unclip-nano", 3, "float32")
    for name in names:
        again = generate(tmp_path / name, "--again", str(tmp_path / "first" / name))
        assert name in again
        assert (tmp_path / name / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    (again,) = generate(tmp_path / "other", "--again", str(tmp_path / "first" / names[0]), "--truncation", "0.9")
    assert read_request(tmp_path / "other" / again)[0] == request | {"truncation": 0.9}


@pytest.mark.parametrize("spec", UNCLIP_NUMERIC, ids=lambda spec: spec.name)
def test_every_setting_of_a_dalle_2_arrives(tmp_path, both, spec):
    values = {"n": 3, "seed": 77, "guidance_scale": 4.5, "truncation": 0.25, "candidates": 5}
    assert set(values) == {spec.name for spec in UNCLIP_NUMERIC}, "a new setting: give it a value here"
    flag = "--" + spec.name.replace("_", "-")
    names = generate(tmp_path, "a cat", "--preset", "unclip-nano", "--grid", flag, str(values[spec.name]))
    (name,) = [name for name in names if name.endswith("grid.png")]
    assert read_request(tmp_path / name)[0][spec.name] == values[spec.name]


@pytest.mark.parametrize(
    ("preset", "arguments", "said"),
    [
        ("unclip-nano", ["--temperature", "0.5"], "unclip-nano has no --temperature; it has --n, --seed, "),
        ("unclip-nano", ["--top-k", "5", "--top-p", "0.5"], "unclip-nano has no --top-k and no --top-p; it has "),
        ("nano", ["--truncation", "0.5"], "has no --truncation; it has --n, --seed, --temperature, "),
        ("unclip-nano", ["--device", "cpu"], "unclip-nano draws on the processor and in float32: leave --device"),
        ("unclip-nano", ["--format", "float16"], "unclip-nano draws on the processor and in float32: leave --device"),
    ],
)
def test_settings_of_the_other_engine_are_refused(tmp_path, both, nano_folder, capsys, preset, arguments, said):
    preset = str(nano_folder) if preset == "nano" else preset
    assert main(["generate", "a cat", "--preset", preset, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_the_other_engine_are_refused_again(tmp_path, both, capsys):
    (name,) = generate(tmp_path, "a cat", "--preset", "unclip-nano", "--n", "1", "--seed", "1")
    assert main(["generate", "--again", str(tmp_path / name), "--top-k", "5", "--out", str(tmp_path / "out")]) == 2
    assert "unclip-nano has no --top-k" in capsys.readouterr().err


def test_candidates_are_written_nearest_first_and_each_draws_itself(tmp_path, engine, shipped, capsys, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    monkeypatch.setattr(engine, "_clip", None)
    monkeypatch.setattr(engines, "engine_for", lambda preset: engines.DalleEngine)
    generate(tmp_path / "first", "a cat", "--n", "2", "--seed", "40", "--candidates", "6", "--grid")
    *lines, sheet = capsys.readouterr().out.splitlines()
    paths, scores = zip(*(line.split("  ") for line in lines), strict=True)
    assert len(paths) == 2
    assert sorted(scores, key=float, reverse=True) == list(scores)
    for path in map(Path, paths):
        request, _ = read_request(path)
        assert (request["n"], request["candidates"], f"001-a-cat-{request['seed']}.png") == (1, 0, path.name)
        generate(tmp_path / path.name, "--again", str(path))
        assert (tmp_path / path.name / path.name).read_bytes() == path.read_bytes()
    request, _ = read_request(Path(sheet))
    assert (request["n"], request["seed"], request["candidates"]) == (2, 40, 6)
    generate(tmp_path / "again", "--again", sheet)
    assert (tmp_path / "again" / Path(sheet).name).read_bytes() == Path(sheet).read_bytes()


def test_help_tells_both_meanings_of_a_flag():
    help_text = " ".join(parser()._subparsers._group_actions[0].choices["generate"].format_help().split())
    assert "DALL-E: Draw so many and show those that fit the prompt best; 0 is off. From 0 to " in help_text
    assert "DALL-E 2: The prior draws so many for each picture; " in help_text
    assert "default random." in help_text


def test_weights_list_names_the_dalle_2_and_its_clip(both, capsys):
    assert main(["weights", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("unclip-nano", CLIP_PRESET):
        assert str(both / name) in lines[name]


def test_assembles_weights(tmp_path, both, capsys):
    """From one folder here, which holds all the parts."""
    parts, out = str(both / "unclip-nano"), tmp_path / "made"
    arguments = ["--prior", parts, "--unclip", parts, "--clip", str(both / CLIP_PRESET), "--out", str(out)]
    assert main(["weights", "assemble", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    made, given = (read_config(Path(folder))["sha256"] for folder in (out, parts))
    assert {part for part in given if made[part] == given[part]} == {"vae"}  # the others are in bytes now
    weights.load_unclip(str(out))
    assert main(["weights", "assemble", *arguments, "--preset", "nano"]) == 2
    assert "--preset must be one of unclip-nano" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [(b"\n \n", "has no prompt"), (b"\xff\xfe", "is no text in UTF-8")])
def test_a_file_without_prompts_is_refused(tmp_path, capsys, content, said):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert main(["generate", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]) == 2
    assert f"prompts.txt {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--n", "0"), ("--n", "99"), ("--temperature", "nan"), ("--top-p", "7"), ("--seed", str(MAX_SEED))],
)
def test_settings_out_of_range(tmp_path, capsys, flag, value):
    model, out = save_tiny(tmp_path / "model", tiny_config()), tmp_path / "out"
    (model / "model.safetensors").unlink()  # which no model has to be read for
    assert main(["generate", "a cat", "--preset", str(model), "--out", str(out), flag, value]) == 2
    assert f"{flag[2:].replace('-', '_')}: " in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["vqgan"], "--steps"),
        (["vqgan", "--steps", "1", "--minutes", "1"], "--steps"),
        (["vqgan", "--steps", "1", "--preset", "gigantic"], "nano"),
        (["vqgan", "--steps", "1", "--preset", "mini"], "no encoder"),
        (["dalle", "--steps", "1", "--preset", "mega", "--vqgan", "v", "--text", "t"], "no encoder"),
        (["vqgan", "--steps", "1"], "pairs.jsonl"),
    ],
)
def test_train_says_what_is_missing(tmp_path, capsys, arguments, word):
    (tmp_path / "images.npy").touch()
    status = main(["train", *arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert status == 2
    assert word in capsys.readouterr().err


def test_a_vqgan_begins_from_the_one_that_is_named(data_folder, tmp_path, monkeypatch):
    made, nano = [], ROOT / "weights" / "nano"
    monkeypatch.setattr("dalle_demo.training.loop.train", lambda make, *_: made.append(make(None)))
    for flags in [[], ["--earlier", str(nano)]]:
        folders = ["--data", str(data_folder), "--out", str(tmp_path)]
        assert main(["train", "vqgan", "--steps", "1", *folders, *flags]) == 0
    without, begun = made
    assert (without.made_from["--earlier"], begun.made_from["--earlier"]) == ("", stored_hash(nano, "vqgan"))


@pytest.mark.parametrize(("stage", "missing"), [("sharpen", "--vqgan"), ("dalle", "--vqgan, --text")])
def test_train_names_the_stages_before(tmp_path, capsys, stage, missing):
    with pytest.raises(SystemExit, match="2"):
        main(["train", stage, "--steps", "1", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert f"required: {missing}\n" in capsys.readouterr().err


def test_data_builds_a_set(tmp_path, capsys):
    packages = Path(__file__).parent / "fixtures" / "npm"
    assert main(["data", "emoji", "--packages", str(packages), "--out", str(tmp_path / "set")]) == 0
    assert capsys.readouterr().out == (tmp_path / "set" / "report.txt").read_text(encoding="utf-8")
    assert main(["data", "emoji", "--packages", str(tmp_path), "--out", str(tmp_path / "other")]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("KeyboardInterrupt", 0, ""),
        ("KeyboardInterrupt('stopped; the same command goes on')", 2, "stopped; the same command goes on"),
        ("ValueError('no weights')", 2, "no weights"),
        ("MemoryError", 2, "there is not enough memory"),
        ("RuntimeError('CUDA out of memory')", 2, "CUDA out of memory"),
    ],
)
def test_page_ends_with_a_sentence(error, status, said):
    code = f"import app\ndef fail(_):\n    raise {error}\napp.serve = fail\napp.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (status, said)


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [(["--port", "99999"], "7860"), (["--port", "0"], "7860"), (["--port", "http"], "7860"), ([], "99999")],
)
def test_page_refuses_what_is_no_port(arguments, variable):
    done = subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"GRADIO_SERVER_PORT": variable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--port: must be a whole number from 1 to 65535" in done.stderr


def test_the_page_serves_a_dalle_2_model_beside_a_dalle(shipped, tmp_path, monkeypatch, capsys):
    import app

    shelves, page = [], SimpleNamespace(launch=lambda **_: (None, "http://here", None), block_thread=lambda: None)
    monkeypatch.setattr("dalle_demo.ui.app.build", lambda shelf: (shelves.append(shelf), (page, {}))[1])
    monkeypatch.setattr(shelf.Shelf, "models", lambda self: [])  # measures
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    mine = shutil.copytree(shipped / "unclip-nano", tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["app.py", "--weights", str(mine)])
    app.serve(app.parse_args())
    assert (shelves[0].home, shelves[0].unclip_home) == ("tiny", "mine")
    assert capsys.readouterr().out == "mine is served at http://here\n"


def run_help(*arguments: str) -> subprocess.CompletedProcess:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['dalle_demo', *{arguments!r}, '--help']\n"
        "try:\n    runpy.run_module('dalle_demo', run_name='__main__')\n"
        "finally:\n    print([name for name in ('torch', 'gradio', 'tokenizers') if name in sys.modules])"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [(), ("generate",), ("train",), ("data",), ("weights",), ("weights", "pull")])
def test_help_loads_nothing_heavy(command):
    done = run_help(*command)
    assert "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
