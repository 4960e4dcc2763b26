"""Results: frozen, printed, plain, saved and loaded; files whole or not at all; hostile files refused."""

import dataclasses
import json
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skipscope as ss
from skipscope._errors import MissingExtra, SkipscopeError
from skipscope._files import write_whole
from skipscope._result import Result, Table, dumps, loads


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    value: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class SampleOfAResult(Result):
    values: np.ndarray
    inner: tuple[Inner, ...]
    by_name: dict[str, float]
    pair: tuple[int, float]
    maybe: Inner | None = None

    def table(self):
        return Table("a sample", ["name", "value"], [[i.name, i.value] for i in self.inner], ["a note"])


def sample(**changes):
    fields = {
        "values": np.array([[1.5, np.nan], [np.inf, -np.inf]]),
        "inner": (Inner("a", 0.25), Inner("[red]b[/red]", None)),
        "by_name": {"x": 1e-300, "y": float("inf")},
        "pair": (3, 0.1),
    }
    return SampleOfAResult(**{**fields, **changes})


def test_saved_and_loaded_it_is_the_same(tmp_path):
    before = sample()
    path = before.save(tmp_path / "sample.json")
    after = ss.load(path)
    assert type(after) is SampleOfAResult
    np.testing.assert_array_equal(after.values, before.values)
    assert after.inner == before.inner
    assert after.by_name == before.by_name
    assert after.pair == before.pair
    assert json.loads(path.read_text())["skipscope"] == ss.__version__


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5), st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_every_number_and_string_survives(numbers, text):
    after = loads(dumps(sample(values=np.array(numbers), inner=(Inner(text, numbers[0]),))))
    np.testing.assert_array_equal(after.values, np.array(numbers))
    assert after.inner[0].name == text


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().pair = (1, 2)


def test_it_prints_as_a_table_and_markup_is_only_text():
    text = str(sample())
    assert "a sample" in text
    assert "[red]b[/red]" in text
    assert "0.250" in text
    assert all(len(line) <= 80 for line in sample().table().text(80).splitlines())


def test_to_dict_is_plain():
    plain = sample().to_dict()
    assert plain["inner"][0] == {"name": "a", "value": 0.25}
    assert plain["values"][0][0] == 1.5
    assert isinstance(plain["values"], list)


def test_every_cut_of_a_file_is_refused(tmp_path):
    text = dumps(sample())
    path = tmp_path / "cut.json"
    for end in range(len(text) - 1):
        path.write_text(text[:end])
        with pytest.raises(SkipscopeError):
            ss.load(path)


HOSTILE = [
    "", "null", "[]", "{}", '{"result": 3}', '{"result": "os.system", "data": {}}', '{"result": "Path", "data": "/"}',
    '{"result": "SampleOfAResult", "data": {"values": "__import__(\'os\')"}}',
    '{"result": "SampleOfAResult", "data": []}', '{"result": ["SampleOfAResult"], "data": {}}', "\x00\x01", "[" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_refused(text, tmp_path):
    path = tmp_path / "hostile.json"
    path.write_text(text)
    with pytest.raises(SkipscopeError, match="load"):
        ss.load(path)


def test_a_missing_file_and_an_unknown_ending(tmp_path):
    with pytest.raises(SkipscopeError, match=r"nowhere\.json"):
        ss.load(tmp_path / "nowhere.json")
    with pytest.raises(SkipscopeError, match=r"\.docx"):
        sample().save(tmp_path / "x.docx")


def test_a_file_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o400

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SkipscopeError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SkipscopeError, match="choose a folder"):
        sample().save(tmp_path / "no" / "such" / "folder.json")


def test_errors_cross_process_borders_whole():
    import pickle

    error = SkipscopeError("ablate", "no", layer="a.b", expected=1, got=2, cure="do this")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.layer, again.cure) == ("a.b", "do this")
    assert "pip install transformers" in str(MissingExtra("compare", "transformers"))


def test_columns_fold_between_words_as_long_as_one_can():
    heads = [
        "twin",
        "optimizer",
        "best rate",
        "final loss",
        "train acc.",
        "test acc.",
        "steps to 0.5",
        "update size",
    ]
    row = ["with shortcuts", "SGD", 0.0333, 0.00670, 0.977, 0.973, "> 400", 0.0323]
    lines = Table("t", heads, [row]).text(80).splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert {"with", "shortcuts", "optimizer", "0.00670", "0.0323", "update"} <= words


def test_a_title_is_not_folded_at_the_width_of_its_table():
    title = "Paths by length: 4 branches, mean length 1.06"
    assert Table(title, ["k"], [[1]]).text(80).splitlines()[0] == title


def test_a_narrow_terminal_cuts_no_word_into_pieces():
    table = Table(
        "t",
        ["depth", "boundary", "gradient", "factor", "activation", "state"],
        [[0, "layers.0", 0.03, 1.1, 0.9, "ok"]],
    )
    text = table.text(40)
    assert all(word in text for word in ("boundary", "activation", "layers.0", "0.0300"))


# --- tables in other formats, files that changed ---


def test_a_table_in_every_format(tmp_path):
    from csv import reader

    result = sample()
    assert "| a | 0.250 |" in result.save(tmp_path / "t.md").read_text()
    rows = list(reader(result.save(tmp_path / "t.csv").open()))
    assert rows == [["name", "value"], ["a", "0.25"], ["[red]b[/red]", ""]]
    assert r"\begin{tabular}{lr}" in result.save(tmp_path / "t.tex").read_text()
    with np.load(result.save(tmp_path / "t.npz")) as arrays:
        assert arrays["value"][0] == 0.25 and np.isnan(arrays["value"][1])
        assert arrays["name"].tolist() == ["a", "[red]b[/red]"]


def test_to_dataframe():
    pandas = pytest.importorskip("pandas")
    frame = sample().to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and frame["value"][0] == 0.25


@pytest.mark.parametrize(
    "sly", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x"]
)
def test_a_cell_of_text_is_no_formula(sly):
    line = Table("t", ["a"], [[sly]]).csv().splitlines()[1]
    assert not line.lstrip('"').startswith(tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20"))


@pytest.mark.parametrize("sly", ["<script>x</script>", "![](http://host/x)", "[a](javascript:x)"])
def test_a_name_in_markdown_is_neither_markup_nor_a_link(sly):
    text = Table(sly, [sly], [[sly]], [sly]).markdown()
    assert "<" not in text and "](" not in text


def test_headings_of_arrays_are_text_whatever_they_hold(tmp_path):
    (tmp_path / "t.npz").write_bytes(Table("t", ["a\ud83d"], [[1.0]]).npz())
    with np.load(tmp_path / "t.npz") as arrays:
        assert arrays.files == ["a\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("sly", ["\n", "\r", "\u2028", "\x0b", "\x85"])
def test_a_comment_of_latex_ends_where_its_line_ends(sly):
    text = Table(
        f"title{sly}\\input{{x}}", ["a"], [[f"cell{sly}\\input{{x}}"]], [f"note{sly}\\input{{x}}"]
    ).latex()
    assert not any(line.startswith("\\input") for line in text.splitlines())


@pytest.mark.parametrize("code", [*range(32), *range(127, 160), 0x202E, 0x2066])
def test_no_control_character_is_printed(code):
    name = f"a{chr(code)}b"
    text = Table(name, [name], [[name]], [f"x{chr(code)}y"]).text(80)
    assert text.count("\N{REPLACEMENT CHARACTER}") == 4
    assert code == 10 or chr(code) not in text


def test_a_file_that_changed_is_said_and_one_of_the_future_refused(tmp_path):
    import warnings

    path = sample().save(tmp_path / "s.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.load(path)
    whole = path.read_text()
    path.write_text(whole.replace("0.25", "0.35"))
    with pytest.warns(UserWarning, match="has changed since it was saved"):
        ss.load(path)
    path.write_text(whole.replace('"format": 1', '"format": 99'))
    with pytest.raises(SkipscopeError, match="later skipscope"):
        ss.load(path)


def test_in_a_notebook_an_error_is_the_users_line_and_the_message():
    def refused():
        raise SkipscopeError("ablate", "no", cure="do this")

    try:
        refused()
    except SkipscopeError as error:
        shown = "\n".join(error._render_traceback_())
    assert shown.endswith("SkipscopeError: ablate: no\n  cure:     do this") and "Traceback" not in shown
    try:
        ss.load("nowhere.json")
    except SkipscopeError as error:
        shown = error._render_traceback_()
    assert shown[0].endswith('ss.load("nowhere.json")')


def test_in_a_notebook_a_table_is_text_alone(monkeypatch):
    """There rich displays what it prints; then print(result) would show everything twice."""
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *parts: shown.append(parts))
    assert str(sample()).startswith("a sample")
    assert shown == []
