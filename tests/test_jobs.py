"""Jobs run one at a time, outlive their server, answer their owner, and are nobody else's business."""

import csv
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune_tiny import SMALL

from dalle_demo.__main__ import main
from dalle_demo.training import finetune, watch
from dalle_demo.training import jobs as module
from dalle_demo.training.export import pack, set_licence
from dalle_demo.training.jobs import Job, JobError, Jobs, smoothed, tidy

ROOT = Path(__file__).resolve().parent.parent
ME, YOU = "my browser's secret", "yours"
# Stands for `train finetune`: counts steps, answers what it is asked, and writes what the real one does.
RUN = """
import json, signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
ending = []
checkpoint = out / "checkpoint.pt"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
if (out / "refuse").exists():
    sys.exit("error: " + str(out / "data") + " has no picture")
def tell(state):
    (out / "state.json.part").write_text(json.dumps({"state": state, "step": step, "steps": 1000, "seconds_left": 1.0,
        "message": "", "notice": {"key": "learning", "values": {}},
        "doing": {"key": "tokens", "done": 3, "total": 12} if state == "preparing" else None}))
    (out / "state.json.part").replace(out / "state.json")
tell("preparing")
while (out / "slow").exists():
    time.sleep(0.02)
signal.signal(signal.SIGTERM, lambda *_: ending.append("paused"))
while not ending and not (out / "finish").exists():
    if (out / "die").exists():
        sys.exit(1)
    step += 1
    tell("running")
    if (out / "ask").exists():
        word = (out / "ask").read_text()
        (out / "ask").unlink()
        (out / "asked").open("a").write(word + " ")
        ending += {"pause": ["paused"], "stop": ["stopped"]}.get(word, [])
    time.sleep(0.02)
checkpoint.write_text(str(step))
tell(ending[0] if ending else "done")
"""


@pytest.fixture
def servers(tmp_path, monkeypatch) -> Iterator[Callable[[], Jobs]]:
    """Maker of what a server has: a new one for each call, all of the same folder; closed before patches end."""
    made = []

    def start() -> Jobs:
        made.append(Jobs(tmp_path / "jobs"))
        return made[-1]

    yield start
    for jobs in made:
        jobs.close()


@pytest.fixture
def server(servers, monkeypatch) -> Callable[[], Jobs]:
    """Maker of servers whose processes only pretend."""
    monkeypatch.setattr(
        Jobs, "command", lambda self, job: [sys.executable, "-c", RUN, str(self.run(job))], raising=True
    )
    monkeypatch.setattr(module, "TICK", 0.05)
    return servers


@pytest.fixture
def jobs(server) -> Jobs:
    return server()


def begin(jobs: Jobs, owner: str = ME, **settings) -> Job:
    return jobs.start(jobs.create(owner), "Mine", {"base": "nano"} | settings)


def wait_for(jobs: Jobs, job: Job, *states: str) -> None:
    deadline = time.monotonic() + 60  # on a busy machine
    while (now := jobs.state(jobs._read(job.id)).state) not in states:
        assert time.monotonic() < deadline, f"{job.id} is {now}"
        time.sleep(0.02)


def wait_for_changes(path: Path, times: int) -> None:
    """Return when a file is there and has been written so many times more."""
    deadline, last = time.monotonic() + 60, None
    while last is None or times > 0:
        assert time.monotonic() < deadline
        if path.exists():
            now = path.stat().st_mtime_ns
            times -= last is not None and now != last
            last = now
        time.sleep(0.002)


def touch(jobs: Jobs, job: Job, name: str) -> None:
    (jobs.run(job) / name).touch()


def test_jobs_run_one_after_another_in_the_order_in_which_they_came(jobs):
    first, second, third = begin(jobs), begin(jobs, YOU), begin(jobs)
    wait_for(jobs, first, "running")
    assert [jobs.state(job).ahead for job in (second, third)] == [1, 2]
    assert jobs.running() == first.id
    touch(jobs, first, "finish")
    wait_for(jobs, first, "done")
    wait_for(jobs, second, "running")
    assert jobs.state(third).state == "waiting"


def test_nobody_sees_what_is_not_theirs(jobs):
    mine = jobs.create(ME)
    assert jobs.of(YOU) == []
    assert [job.id for job in jobs.of(ME)] == [mine.id]
    assert ME not in (jobs.root / mine.id / "job.json").read_text()
    for owner, name in ((YOU, mine.id), (ME, "0" * 32), (ME, f"../jobs/{mine.id}"), (ME, ""), (None, mine.id)):
        with pytest.raises(JobError, match="job_unknown"):
            jobs.get(owner, name)
    assert (jobs.root.stat().st_mode & 0o077) == 0


def test_pause_lets_another_job_run_and_resume_goes_on_where_it_was(jobs):
    first, second = begin(jobs), begin(jobs)
    wait_for(jobs, first, "running")
    assert jobs.state(jobs.pause(first)).state == "pausing"
    wait_for(jobs, first, "paused")
    reached = jobs.state(jobs._read(first.id)).step
    wait_for(jobs, second, "running")
    jobs.resume(jobs._read(first.id))
    assert jobs.state(jobs._read(first.id)).state == "waiting"
    jobs.stop(second)
    wait_for(jobs, second, "stopped")
    wait_for(jobs, first, "running")
    assert jobs.state(jobs._read(first.id)).step > reached > 0


def test_save_is_asked_for_and_changes_nothing_else(jobs):
    job = begin(jobs)
    wait_for(jobs, job, "running")
    jobs.save(job)
    while not (jobs.run(job) / "asked").exists():
        time.sleep(0.02)
    assert (jobs.run(job) / "asked").read_text() == "save "
    assert jobs.state(job).state == "running"


def test_a_job_that_waits_can_be_paused_and_stopped(jobs):
    first, second = begin(jobs), begin(jobs)
    wait_for(jobs, first, "running")
    assert jobs.state(jobs.pause(second)).state == "paused"
    assert jobs.state(jobs.stop(jobs._read(second.id))).state == "stopped"
    assert jobs.state(jobs.resume(jobs._read(second.id))).state == "stopped"


def test_what_gets_ready_says_what_it_does_and_can_be_ended_at_once(jobs):
    first = jobs.create(ME)
    touch(jobs, first, "slow")
    first = jobs.start(first, "Mine", {"base": "nano"})
    wait_for(jobs, first, "preparing")
    wait_for_changes(jobs.run(first) / "state.json", 0)
    assert jobs.state(first).doing == ("tokens", {"done": 3, "total": 12})
    second = begin(jobs)
    assert jobs.pause(first).wish == "pause"
    wait_for(jobs, first, "paused")
    wait_for(jobs, second, "running")
    assert jobs.state(second).doing is None
    jobs.stop(second)
    jobs.resume(jobs._read(first.id))
    wait_for(jobs, first, "preparing")
    jobs.stop(jobs._read(first.id))
    wait_for(jobs, first, "stopped")
    assert jobs.state(first).doing is None
    assert not (jobs.run(first) / "asked").exists()


def test_a_draft_is_not_started_while_it_is_changed(jobs):
    job = jobs.create(ME)
    starting = threading.Thread(target=jobs.start, args=(job, "Mine", {"base": "nano"}))
    with jobs.editing(job):
        starting.start()
        starting.join(0.2)
        assert jobs.get(ME, job.id).wish == "draft"
    starting.join(10)
    with pytest.raises(JobError, match="job_started"), jobs.editing(job):
        pass


def test_a_killed_process_is_started_again(jobs):
    job = begin(jobs)
    wait_for(jobs, job, "running")
    former = jobs._holder()[1]
    os.kill(former, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while jobs._holder()[1] in (former, -1):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wait_for(jobs, job, "running")


def test_a_process_that_ends_again_and_again_is_given_up(jobs):
    job = jobs.create(ME)
    touch(jobs, job, "die")
    job = jobs.start(job, "Mine", {"base": "nano"})
    wait_for(jobs, job, "failed")
    assert jobs.state(jobs._read(job.id)).message == "killed"
    (jobs.run(job) / "die").unlink()
    jobs.resume(jobs._read(job.id))
    wait_for(jobs, job, "running")


def test_what_a_process_says_at_its_end_is_told_without_folders(jobs):
    job = jobs.create(ME)
    touch(jobs, job, "refuse")
    job = jobs.start(job, "Mine", {"base": "nano"})
    wait_for(jobs, job, "failed")
    assert jobs.state(jobs._read(job.id)).message == "run/data has no picture"


def test_a_server_that_ends_leaves_a_checkpoint_and_the_next_one_goes_on(server, caplog):
    jobs = server()
    job = begin(jobs)
    wait_for(jobs, job, "running")
    with caplog.at_level(logging.INFO):
        jobs.close()
    assert caplog.messages == ["the training of Mine rests now: start this program again, and it goes on"]
    deadline = time.monotonic() + 10
    while jobs.running():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reached = int((jobs.run(job) / "checkpoint.pt").read_text())
    time.sleep(0.2)
    assert not jobs.running(), "a closed server starts nothing"
    wait_for(server(), job, "running")
    assert jobs.state(job).step >= reached


@pytest.mark.skipif(os.name == "nt", reason="the lock is one of POSIX")
def test_the_run_of_a_server_that_was_killed_is_found_again(server, tmp_path):
    starter = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from dalle_demo.training.jobs import Jobs;"
        "Jobs.command = lambda self, job: [sys.executable, '-c', sys.argv[3], str(self.run(job))];"
        "jobs = Jobs(__import__('pathlib').Path(sys.argv[2]));"
        "print(jobs.start(jobs.create('me'), 'Mine', {'base': 'nano'}).id, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", starter, str(ROOT), str(tmp_path / "jobs"), RUN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    name = process.stdout.readline().strip()
    run = tmp_path / "jobs" / name / "run"
    deadline = time.monotonic() + 30
    while not (run / "state.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    jobs = server()
    job = jobs.get("me", name)
    assert jobs.running() == name
    other = begin(jobs)
    time.sleep(0.3)
    assert jobs.state(other).state == "waiting", "one at a time, whichever server began"
    assert jobs.state(jobs.pause(job)).state == "pausing"
    wait_for(jobs, job, "paused")
    wait_for(jobs, other, "running")


class Fork:
    """Stands for subprocess.Popen: a copy of this process, which has imported torch already."""

    def __init__(self, command: list[str], stdout, **_):
        self._status, self._asking = None, threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            sys.stdout = sys.stderr = stdout
            try:
                torch.set_num_threads(1)
                status = main(command[3:])  # after `python -m dalle_demo`
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        with self._asking:
            if self._status is None and os.waitpid(self.pid, os.WNOHANG)[0]:
                self._status = 0
        return self._status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


STEPS = 48


@pytest.fixture
def real(servers, monkeypatch, one_thread) -> Callable[[], Jobs]:
    """Maker of servers that fine-tune the tiny model."""
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=Fork, DEVNULL=None))
    for name, value in {"TICK": 0.02, "NICENESS": 0}.items():
        monkeypatch.setattr(module, name, value)
    for part, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(part, name, value)
    monkeypatch.setattr(finetune, "CHECKPOINTS", 12)
    monkeypatch.setattr(watch, "previews_a_prompt", lambda config: 1)
    return servers


def process_of(jobs: Jobs, job: Job, former: int) -> int:
    """Number of the job's process, once another than the former one runs."""
    deadline = time.monotonic() + 60
    while True:
        if (jobs.root / "lock").exists():
            holder, number = jobs._holder()
            if holder == job.id and number not in (former, -1):
                return number
        assert time.monotonic() < deadline, jobs.state(job)
        time.sleep(0.002)


@pytest.mark.skipif(sys.platform != "linux", reason="a process with threads is forked")
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_killed_whenever_the_weights_are_those_of_an_unbroken_run(real, seed, nano_folder, data, tmp_path):
    """SIGKILL, five times: before the first step, at a step, at a checkpoint; the server is ended or killed as well."""
    rng, jobs, process = random.Random(seed), real(), -1
    job = jobs.create(ME)
    shutil.copytree(data, jobs.data(job))
    settings = {"base": str(nano_folder), "steps": STEPS, "rank": 4}
    job = jobs.start(job, "Mine", settings)
    run = jobs.run(job)
    for number in range(5):
        process = process_of(jobs, job, process)
        if number % 2:  # at least one checkpoint further, since a job that gets no further is given up
            wait_for_changes(run / "checkpoint.pt", 1)
            time.sleep(rng.uniform(0, 0.2))
        else:
            wait_for_changes(run / "state.json", rng.randrange(20 if number == 0 else 3))
        assert jobs.state(job).state in ("waiting", "preparing", "running")
        fate = rng.choice(["lives", "ends", "is killed"])
        if fate == "is killed":
            jobs._closed.set()
        os.kill(process, signal.SIGKILL)
        if fate == "ends":
            jobs.close()
        if fate != "lives":
            jobs = real()
    wait_for(jobs, job, "done")
    finetune.finetune(finetune.FinetuneSettings(**settings, data=str(data)), tmp_path / "whole")
    kept = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    kept += [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("previews/*.png")]
    assert len(kept) == 2 + 1 + finetune.CHECKPOINTS
    for name in kept:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_process_runs_at_low_priority_and_its_command_tells_nothing(jobs, monkeypatch):
    job = begin(jobs, prompt="my secret prompt")
    wait_for(jobs, job, "running")
    assert os.getpriority(os.PRIO_PROCESS, jobs._holder()[1]) == module.NICENESS
    monkeypatch.undo()
    assert "secret" not in " ".join(jobs.command(job))
    settings = json.loads((jobs.run(job) / "settings.json").read_text())
    assert settings == {"base": "nano", "prompt": "my secret prompt", "data": str(jobs.data(job))}


def test_delete_ends_the_process_and_leaves_nothing(jobs):
    first, second = begin(jobs), begin(jobs)
    wait_for(jobs, first, "running")
    jobs.delete(first)
    assert not (jobs.root / first.id).exists()
    assert [job.id for job in jobs.of(ME)] == [second.id]
    wait_for(jobs, second, "running")


@pytest.mark.parametrize("note", ["", "word", "{id} -1", "{id} 0", "{id} x", "{other} {pid}"])
def test_nothing_but_the_process_of_the_job_is_ever_signalled(jobs, monkeypatch, note):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    job = jobs.create(ME)
    (jobs.root / "lock").write_text(note.format(id=job.id, other="0" * 32, pid=os.getpid()))
    jobs._signal(signal.SIGTERM, job.id)
    assert sent == []


def test_delete_ends_a_process_whose_number_was_never_written(jobs):
    job = begin(jobs)
    wait_for(jobs, job, "running")
    process = jobs._process
    (jobs.root / "lock").write_text("")
    jobs.delete(job)
    assert process.wait(timeout=5) == -signal.SIGKILL
    assert not (jobs.root / job.id).exists()


def grow_old(jobs: Jobs, job: Job, days: float) -> None:
    old = time.time() - days * module.DAY
    for path in (jobs.root / job.id / "job.json", jobs.root / job.id):
        if path.exists():
            os.utime(path, (old, old))


def test_what_nobody_touches_is_deleted_while_the_server_runs(server, monkeypatch):
    monkeypatch.setattr(module, "HOUR", 0.05)
    jobs = server()
    draft, kept, broken, unreadable = (jobs.create(owner) for owner in ("a", "b", "c", "d"))
    (jobs.root / broken.id / "job.json").unlink()
    (jobs.root / unreadable.id / "job.json").write_text("{")
    other = jobs.root / "not-a-job"
    other.mkdir()
    os.utime(other, (0, 0))
    grow_old(jobs, kept, 1.1)
    jobs.touch(kept)
    for job in (draft, broken, unreadable):
        grow_old(jobs, job, 1.1)
    deadline = time.monotonic() + 10
    while {path.name for path in jobs.root.iterdir()} != {kept.id, "not-a-job"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_was_started_is_kept_for_a_month(jobs):
    job = begin(jobs)
    wait_for(jobs, job, "running")
    jobs.pause(job)
    wait_for(jobs, job, "paused")
    grow_old(jobs, job, 29)
    jobs._clear()
    assert (jobs.root / job.id).exists()
    grow_old(jobs, job, 31)
    jobs._clear()
    assert not (jobs.root / job.id).exists()


@pytest.mark.parametrize("error", [JobError("job_unknown"), OSError("no room"), RuntimeError("a bug")])
def test_a_job_that_cannot_be_started_does_not_keep_the_others_waiting(jobs, monkeypatch, error):
    spawn, bad = jobs._spawn, jobs.create(ME)

    def fail(job, lock):
        if job.id == bad.id:
            raise error
        return spawn(job, lock)

    monkeypatch.setattr(jobs, "_spawn", fail)
    jobs.start(bad, "Bad", {"base": "nano"})
    good = begin(jobs, YOU)
    wait_for(jobs, good, "running")
    assert jobs.state(jobs._read(bad.id)).message == "not_started"


def test_a_process_that_never_said_anything_was_killed(jobs):
    assert jobs._last_words(jobs.create(ME)) == "killed"


def test_pictures_are_put_into_a_draft_only(jobs):
    job = jobs.create(ME)
    for number in range(2):
        folder = jobs.run(job) / f"upload{number}"
        folder.mkdir()
        (folder / str(number)).touch()
        if number:
            jobs.start(job, "Mine", {"base": "nano"})
            with pytest.raises(JobError, match="job_started"):
                jobs.put_data(job, folder)
        else:
            jobs.put_data(job, folder)
    assert [path.name for path in jobs.data(job).iterdir()] == ["0"]


def test_an_owner_has_one_draft_and_two_turns(jobs):
    assert jobs.create(ME).id == jobs.create(ME).id != jobs.create(YOU).id
    first, _ = begin(jobs), begin(jobs)
    with pytest.raises(JobError, match="own_queue_full"):
        begin(jobs)
    assert begin(jobs, YOU)
    jobs.pause(first)
    begin(jobs)
    wait_for(jobs, first, "paused")
    with pytest.raises(JobError, match="own_queue_full"):
        jobs.resume(jobs._read(first.id))


def test_a_job_is_started_once_and_the_queue_has_an_end(jobs, monkeypatch):
    job = begin(jobs)
    with pytest.raises(JobError, match="job_started"):
        jobs.start(job, "Again", {})
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    with pytest.raises(JobError, match="queue_full"):
        begin(jobs)


def test_titles_are_one_line():
    assert tidy(" my\n\x1b[1m  mascot<br>\t") == "my [1m mascot br"
    assert len(tidy("x" * 500)) == module.MAX_TITLE


def test_smoothing_does_not_lean_towards_zero():
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
    assert 1 < smoothed([4.0, 1.0])[1] < 4


def test_importing_it_brings_no_torch():
    code = "import sys, dalle_demo.training.jobs, dalle_demo.training.export; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def run(tmp_path) -> Path:
    """What a finished run has left."""
    run = tmp_path / "run"
    for folder in ("weights", "previews", "data"):
        (run / folder).mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "lora.safetensors", "tokenizer.json"):
        (run / "weights" / name).write_bytes(name.encode())
    (run / "weights" / "README.md").write_text("---\nlicense: other\nlicense_name: fill-in\n---\n# Mine\n")
    (run / "previews" / "000010.png").write_bytes(b"picture")
    (run / "reconstruction.png").write_bytes(b"with the originals")
    (run / "data" / "examples.jsonl").write_text(
        '{"file": "pictures/0000.png", "caption": "一只猫", "name": "a.png"}\n'
    )
    (run / "log.jsonl").write_text('{"step": 0, "validation_loss": 3.5}\n{"step": 5, "loss": 2.5}\n{"step": 6, "lo')
    (run / "settings.json").write_text('{"base": "/home/me/nano", "data": "/home/me/cats", "seed": 3}')
    return run


def test_the_zip_has_the_model_and_how_it_came_about_but_no_training_picture(run, tmp_path):
    with zipfile.ZipFile(pack(run, "my-cat", tmp_path / "my-cat.zip")) as archive:
        content = {name.removeprefix("my-cat/"): archive.read(name).decode() for name in archive.namelist()}
    weights = {"config.json", "model.safetensors", "lora.safetensors", "tokenizer.json", "README.md"}
    training = {"training/captions.jsonl", "training/loss.csv", "training/settings.json"}
    assert content.keys() == weights | training | {"previews/000010.png"}
    assert json.loads(content["training/captions.jsonl"]) == {"file_name": "a.png", "text": "一只猫"}
    rows = list(csv.DictReader(io.StringIO(content["training/loss.csv"])))
    assert [(row["step"], row["loss"], row["validation_loss"]) for row in rows] == [("0", "", "3.5"), ("5", "2.5", "")]
    assert json.loads(content["training/settings.json"]) == {"base": "nano", "seed": 3}
    assert "/home" not in "".join(content.values())


def test_a_base_that_was_trained_here_has_the_name_of_its_run(run, tmp_path):
    base = tmp_path / "runs" / "my-dalle" / "weights"
    base.mkdir(parents=True)
    (base.parent / "log.jsonl").touch()
    (run / "settings.json").write_text(json.dumps({"base": str(base), "data": "/home/me/cats"}))
    with zipfile.ZipFile(pack(run, "my-cat", tmp_path / "my-cat.zip")) as archive:
        assert json.loads(archive.read("my-cat/training/settings.json")) == {"base": "my-dalle"}


def test_a_licence_goes_into_the_card_and_cannot_be_more_than_one(run):
    set_licence(run / "weights", "cc-by-4.0")
    card = (run / "weights" / "README.md").read_text()
    assert "license_name: cc-by-4.0\n" in card
    for wrong in ("", "a b", "x\ntags: [evil]", "y" * 99):
        with pytest.raises(ValueError, match="SPDX"):
            set_licence(run / "weights", wrong)
    assert (run / "weights" / "README.md").read_text() == card
