"""Stop ends every run that a browser session has asked for, drawn or queued, and nobody else's."""

import pytest

from dalle_demo.ui.generate import Runs


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_a_new_run_ends_the_queued_ones_before_it(runs):
    for _ in range(3):
        runs.begin("me")
    flags = [runs.enter("me") for _ in range(3)]
    assert [flag.is_set() for flag in flags] == [True, True, False]


def test_stop_reaches_queued_and_drawn_runs(runs):
    runs.begin("me")
    drawn = runs.enter("me")
    runs.begin("me")
    runs.stop("me")
    assert drawn.is_set()
    assert runs.enter("me").is_set()


def test_a_session_is_known_until_its_last_run_is_over(runs):
    runs.begin("me")
    runs.begin("me")
    first = runs.enter("me")
    runs.leave("me", first)
    assert "me" in runs
    runs.leave("me", runs.enter("me"))
    assert "me" not in runs


def test_sessions_do_not_reach_each_other(runs):
    runs.begin("me")
    runs.begin("you")
    runs.stop("you")
    runs.forget("you")
    assert not runs.enter("me").is_set()


def test_callers_without_a_session_have_flags_of_their_own(runs):
    first, second = runs.enter(None), runs.enter(None)
    first.set()
    assert not second.is_set()
    runs.leave(None, first)
