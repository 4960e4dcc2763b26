"""The progress display: by itself at a terminal and in a notebook once a call takes long, never in a pipe."""

import io

import pytest

from skipscope import _progress
from skipscope._progress import progress, say, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_progress, "_PATIENCE", -1.0)


def test_a_pipe_gets_nothing_unasked(impatient, monkeypatch):
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    assert list(track(range(3), "adding")) == [0, 1, 2]
    assert file.getvalue() == ""


def test_a_terminal_gets_bars_unless_silenced(impatient, monkeypatch):
    monkeypatch.setattr("sys.stderr", file := Terminal())
    assert list(track(range(3), "adding")) == [0, 1, 2]
    assert "adding" in file.getvalue()
    assert _progress._display is None
    monkeypatch.setattr("sys.stderr", quiet := Terminal())
    with progress(show=False):
        list(track(range(3), "adding"))
        say("nothing")
    assert quiet.getvalue() == ""


def test_a_short_call_shows_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", file := Terminal())
    list(track(range(3), "adding"))
    assert file.getvalue() == ""


def test_a_notebook_gets_one_line_that_is_rewritten(impatient, monkeypatch):
    monkeypatch.setattr(_progress, "_in_notebook", lambda: True)
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    for _ in track(range(3), "outer"):
        list(track(range(2), "inner"))
    written = file.getvalue()
    assert "outer: 2 of 3" in written and "\n" not in written
    assert written.endswith("\r") and not written.rpartition("\r")[0].rpartition("\r")[2].strip()


def test_a_display_ends_when_the_work_fails(impatient, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(ZeroDivisionError):
        for i in track(range(3), "dividing"):
            1 / (1 - i)
    assert _progress._display is None


def test_asked_for_a_pipe_gets_lines():
    file = io.StringIO()
    with progress(file=file):
        list(track(range(3), "adding"))
        say("a word")
    assert file.getvalue().splitlines()[0] == "adding (3 steps)" and "a word" in file.getvalue()


def test_a_name_is_no_markup_and_moves_no_cursor(impatient, monkeypatch):
    monkeypatch.setattr("sys.stderr", file := Terminal())
    assert list(track(range(2), "training a[/bold]\x1b]0;title\x07")) == [0, 1]
    assert "training a[/bold]" in file.getvalue() and "\x1b]0" not in file.getvalue()
    file = io.StringIO()
    with progress(file=file):
        list(track(range(2), "b\x1b[2J"))
        say("c\x1b[2J")
    assert "\x1b" not in file.getvalue()
