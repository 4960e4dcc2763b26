"""Folders of a monitor that were damaged, made by a later version or hold what is no file: refused in words."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope._result import finite
from skipscope.monitor import STATES
from skipscope.monitor.history import _history_reader, _run_store
from skipscope.monitor.recording._step_row import SCALARS


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a short run."""
    return run(tmp_path_factory.mktemp("kept") / "run")


def run(folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, x, y = torch.optim.SGD(model.parameters(), 0.1), torch.randn(6, 8), torch.arange(6) % 3
    with ss.watch(model, optimizer, folder=folder, **options):
        for _ in range(4):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return folder


def test_a_folder_of_a_later_format_is_refused(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    about = json.loads((folder / "monitor.json").read_text())
    (folder / "monitor.json").write_text(json.dumps(about | {"format": about["format"] + 1}))
    with pytest.raises(ss.SkipscopeError, match=r"(?s)a later skipscope.*update skipscope"):
        ss.load(folder)


@pytest.mark.parametrize("file", ["events.jsonl", "gradients-0-000.rows"])
def test_a_pipe_in_a_folder_is_refused(kept, tmp_path, file):
    folder = shutil.copytree(kept, tmp_path / "run")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ss.SkipscopeError, match="a pipe"):
        ss.load(folder)


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="this system has no such file")
@pytest.mark.parametrize("file", ["monitor.json", "events.jsonl", "gradients-0-000.rows"])
def test_a_file_without_a_size_in_a_folder_is_not_read(kept, tmp_path, file):
    """Reading it waits for ever: it counts as empty, which only monitor.json may not be."""
    folder = shutil.copytree(kept, tmp_path / "run")
    (folder / file).unlink()
    (folder / file).symlink_to("/proc/kmsg")
    if file == "monitor.json":
        with pytest.raises(ss.SkipscopeError, match="empty"):
            ss.load(folder)
    else:
        assert len(ss.load(folder)) == (0 if file.endswith("rows") else 4)


def test_a_folder_with_values_of_other_types_is_refused_or_prints(kept, tmp_path):
    """One value of monitor.json, of an event or of a file's first line is of another type, in 200 folders."""
    draw, others = random.Random(0), (None, "text", -1, 1e400, [], {}, True, [[]], {"a": 1})
    refused = 0
    for i in range(200):
        folder = shutil.copytree(kept, tmp_path / f"{i}")
        path = folder / draw.choice(["monitor.json", "events.jsonl", "gradients-0-000.rows"])
        is_rows = path.suffix == ".rows"
        head, _, rows = path.read_bytes().partition(b"\n") if is_rows else (path.read_bytes(), b"", b"")
        content = [json.loads(line) for line in head.splitlines()]
        for line in content:
            line.pop("crc32")  # the types are looked at, as in a folder of an earlier version
        holder, key = draw.choice([place for line in content for place in places(line)])
        holder[key] = draw.choice(others)
        path.write_bytes(b"\n".join(json.dumps(line).encode() for line in content) + b"\n" + rows)
        try:
            history = ss.load(folder)
        except ss.SkipscopeError:
            refused += 1
        else:
            assert str(history) and history.to_dict()
        shutil.rmtree(folder)
    assert 20 < refused < 180


def rows_file(folder):
    """(path, its first line, its rows with their checksums as bytes)."""
    path = folder / "gradients-0-000.rows"
    first, _, rows = path.read_bytes().partition(b"\n")
    size = 8 * (json.loads(first)["width"] + 1)
    return path, first, [rows[i : i + size] for i in range(0, len(rows), size)]


def test_a_row_that_has_changed_is_left_out_with_a_note(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    path, first, rows = rows_file(folder)
    rows[1] = rows[1][:20] + bytes([rows[1][20] ^ 4]) + rows[1][21:]
    path.write_bytes(first + b"\n" + b"".join(rows))
    whole, history = ss.load(kept), ss.load(folder)
    np.testing.assert_array_equal(history.steps, [1, 3, 4])
    np.testing.assert_array_equal(history.norm, whole.norm[[0, 2, 3]])
    (note,) = set(history.notes) - set(whole.notes)
    assert note.startswith("1 rows of gradients-0-000.rows have changed")


def test_a_run_is_resumed_from_its_last_row_that_has_not_changed(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    path, first, rows = rows_file(folder)
    rows[3] = bytes([rows[3][0] ^ 1]) + rows[3][1:]
    path.write_bytes(first + b"\n" + b"".join(rows))
    assert _run_store.begin_folder(folder, resume=True).step == 3
    path.write_bytes(first + b"\n" + b"".join(rows[:3]) + rows[3][:-5])  # torn, as after a kill
    assert _run_store.begin_folder(folder, resume=True).step == 3
    np.testing.assert_array_equal(ss.load(folder).steps, [1, 2, 3])
    assert not any("changed" in note for note in ss.load(folder).notes)


@pytest.mark.parametrize("ending", [b"\x0b", b""])
def test_a_first_line_whose_end_has_changed_is_not_taken_for_a_file_just_begun(kept, tmp_path, ending):
    folder = shutil.copytree(kept, tmp_path / "run")
    path, first, rows = rows_file(folder)
    path.write_bytes(first + ending + b"".join(rows))
    with pytest.raises(ss.SkipscopeError, match=r"damaged .*gradients-0-000\.rows"):
        ss.load(folder)
    path.write_bytes(first[:30])
    assert len(ss.load(folder)) == 0


def without_checksums(folder):
    """The folder as earlier versions wrote it."""
    path, first, rows = rows_file(folder)
    columns = json.loads(first)
    del columns["crc32"], columns["checked"]
    path.write_bytes(json.dumps(columns).encode() + b"\n" + b"".join(row[:-8] for row in rows))
    for path in (folder / "monitor.json", folder / "events.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            del line["crc32"]
            line.update({"format": 2} if "format" in line else {})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_folder_of_an_earlier_version_is_read_and_resumed(kept, tmp_path):
    folder = without_checksums(shutil.copytree(kept, tmp_path / "run"))
    assert finite(ss.load(folder).to_dict()) == finite(ss.load(kept).to_dict())
    run(folder, resume=True)
    both = ss.load(folder)
    np.testing.assert_array_equal(both.steps, range(1, 9))
    np.testing.assert_array_equal(both.norm[:4], ss.load(kept).norm)
    assert json.loads((folder / "monitor.json").read_text())["format"] == 3  # an earlier version refuses it
    assert not any("changed" in note for note in both.notes)


@pytest.mark.parametrize(("text", "words"), [("{", "is damaged"), ('{"format": 99}', "a later skipscope")])
def test_a_folder_that_cannot_be_read_is_not_resumed(kept, tmp_path, text, words):
    folder = shutil.copytree(kept, tmp_path / "run")
    (folder / "monitor.json").write_text(text)
    with pytest.raises(ss.SkipscopeError, match=words):
        run(folder, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in kept.iterdir())


def places(value):
    """Each holder and key of the values in plain data."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


NAN = float("nan")


@pytest.mark.parametrize(("row", "norm", "relative", "reach"), [
    ([7, 0.1, 0.2], [0.1, 0.2], [NAN, NAN], [NAN, NAN, NAN]),  # the first versions kept an RMS alone
    ([7, 0.1, 0.2, 1.0, 2.0], [1.0, 2.0], [NAN, NAN], [NAN, NAN, NAN]),
    ([7, 0.1, 0.2, 1.0, 2.0, 5.0, 9.0], [1.0, 2.0], [NAN, NAN], [5.0, 9.0, NAN]),
    ([7, 0.1, 0.2, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 9.0, NAN]),
    ([7, 0.1, 0.2, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 0.5], [1.0, 2.0], [3.0, 4.0], [5.0, 9.0, 0.5]),
])  # fmt: skip
def test_a_row_of_flow_is_read_in_each_form_it_ever_had(row, norm, relative, reach):
    other = {"names": ["a", "x", "b"], "optimizer": 1}
    flow = [({"names": ["a", "b"]}, np.array([row])), (other, np.array([[8, 0.5, 0.6, 0.7, 5.0, 6.0, 7.0]]))]
    names, rms, owners, norms, relatives, reaches = _history_reader._flow(flow)
    assert names == ("a", "x", "b")
    np.testing.assert_array_equal(rms, [[7, 0.1, NAN, 0.2], [8, 0.5, 0.6, 0.7]])
    np.testing.assert_array_equal(norms, [[norm[0], -1, norm[1]], [5, 6, 7]])
    np.testing.assert_array_equal(relatives, [[relative[0], NAN, relative[1]], [NAN] * 3])
    np.testing.assert_array_equal(reaches, [reach, [NAN] * 3])
    np.testing.assert_array_equal(owners, [0, 1])


def test_numbers_of_another_optimizer_are_unknown_in_a_row():
    about = {"names": ["b", "a"], "optimizer": 1, "tiny": [1e-38, 1e-38]}
    scalars = np.arange(len(SCALARS), dtype=float)
    rows = np.array([[*scalars, 4.0, 3.0, 0.5, -2.0, 6.0, 5.0]])  # norms, mean |g|, norms before clipping
    column = {(0, "x"): 0, (1, "a"): 1, (1, "b"): 2, (0, "y"): 3, (2, "z"): 4}
    found = _history_reader._block(about, rows, column)[0]
    np.testing.assert_array_equal(found[: len(SCALARS) + 1], [*scalars, 1])
    norm, mean, before, states = found[len(SCALARS) + 1 :].reshape(4, 5)
    np.testing.assert_array_equal(norm, [NAN, 3.0, 4.0, NAN, NAN])
    np.testing.assert_array_equal(mean, [NAN, NAN, 0.5, NAN, NAN])
    np.testing.assert_array_equal(before, [NAN, 5.0, 6.0, NAN, NAN])
    absent = STATES.index("absent")
    np.testing.assert_array_equal(states, [absent, 2, STATES.index("ok"), absent, absent])
