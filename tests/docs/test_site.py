"""The site builds without a warning, every page's code runs, and every public name has a page."""

import ast
import doctest
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import skipscope as ss

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("snippets", DOCS / "_ext" / "snippets.py")
assert spec is not None and spec.loader is not None
snippets = importlib.util.module_from_spec(spec)
sys.modules["snippets"] = snippets
spec.loader.exec_module(snippets)

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [
        ROOT / "README.md",
        *(p for sub in (".", "howto", "papers") for p in sorted((DOCS / sub).glob("*.md"))),
    ]
}
QUICK = {
    "docs/options.md",
    "docs/words.md",
    "docs/howto/data.md",
    "docs/howto/extend.md",
    "docs/howto/nan.md",
    "docs/howto/watch.md",
}
SCRIPTS = sorted((ROOT / "examples" / "gallery").glob("*.py"))


def runs(name: str) -> bool:
    return any(
        block.language in {"python", "bash", "shell"} for block in snippets.blocks(PAGES[name].read_text())
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PAGES if runs(n)],
)
def test_every_snippet_runs(name, monkeypatch):
    text = PAGES[name].read_text()
    if missing := snippets.missing_packages(text):
        pytest.skip(f"{', '.join(missing)} not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert list(snippets.run_page(text, name, slow=True))


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_says_that_it_is_not(name):
    kinds = {block.language for block in snippets.blocks(PAGES[name].read_text())}
    assert kinds <= {"python", "bash", "shell", "console", "text", "bibtex"}


def test_a_failing_snippet_names_its_page_and_line():
    page = "words\n\n```python\nx = 1\n```\n\n<!-- python\nassert x == 2\n-->\n"
    with pytest.raises(RuntimeError, match=r"page\.md:8: AssertionError"):
        list(snippets.run_page(page, "page.md"))


def test_the_last_line_of_a_block_is_shown():
    page = "```python\nprint('a')\n1 + 1\n```\n"
    [(block, printed, value)] = snippets.run_page(page, "page.md")
    assert (block.line, printed, value) == (2, "a\n", 2)


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^   (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    modules = {"book", "nn", "reference", "testing"}
    assert set(ss.__all__) - modules <= listed


def examples_of(value):
    return [one.source for one in doctest.DocTestParser().get_examples(value.__doc__ or "")]


def public_names(module):
    """Name -> class or function, of those that the module itself offers."""
    found = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) or inspect.isfunction(value)
        if value.__module__.startswith(module.__name__)
    }


def without_docstring_example(names):
    return [name for name, value in names.items() if not examples_of(value)]


@pytest.mark.parametrize(
    ("module", "least"), [(ss, 60), (ss.nn, 100), (ss.reference, 16), (ss.testing, 2), (ss.book, 6)],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_every_public_name_has_an_example_in_its_docstring(module, least):
    names = public_names(module)
    assert len(names) >= least
    assert without_docstring_example(names) == []


def test_a_name_without_an_example_is_seen():
    class Child(ss.nn.ReZero):
        """Without an example, though its parent has one."""

    assert without_docstring_example({"Child": Child, "ReZero": ss.nn.ReZero}) == ["Child"]


def used_in(sources):
    """Name of a call -> the keywords and the places of the arguments with which it is called."""
    used = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                keywords = {keyword.arg for keyword in node.keywords}
                used.setdefault(name, set()).update(keywords, range(len(node.args)))
    return used


def without_example(functions, used):
    """The options, as ``function.option``, that no example uses."""
    missing = []
    for name, function in functions.items():
        for place, option in enumerate(inspect.signature(function).parameters.values()):
            if option.kind in {option.VAR_KEYWORD, option.VAR_POSITIONAL}:
                continue
            at = set() if option.kind is option.KEYWORD_ONLY else {place}
            if not used.get(name, set()) & {option.name, *at}:
                missing.append(f"{name}.{option.name}")
    return missing


def test_every_option_of_every_public_function_is_used_by_an_example_that_runs():
    functions = {name: getattr(ss, name) for name in ss.__all__ if inspect.isfunction(getattr(ss, name))}
    pages = [
        block.code
        for text in (path.read_text() for path in PAGES.values())
        for block in snippets.blocks(text)
        if block.language == "python"
    ]
    used = used_in(pages + [source for name in ss.__all__ for source in examples_of(getattr(ss, name))])
    assert without_example(functions, used) == []


def test_an_option_without_an_example_is_seen():
    def call(model, *, seed=0, weight=None): ...

    assert without_example({"call": call}, used_in(["ss.call(net, seed=1)"])) == ["call.weight"]


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_gallery", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(package, reason="the site's tools are not installed (extra docs)")
    # A copy: the builder writes stubs beside the pages. "dummy" reads and resolves everything, and writes no page.
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "api", "gallery"))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    results = "reproductions/results"
    shutil.copytree(ROOT / results, tmp_path / results, ignore=shutil.ignore_patterns("units"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy", "docs", "out"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"SKIPSCOPE_DOCS_RUN": "0", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_gallery_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_digits", "hf_gpt2"])
def test_examples_run_when_run(name):
    if name == "hf_gpt2":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "healthy" in done.stdout


def test_paths_that_pages_name_are_there():
    for name, path in PAGES.items():
        for file in re.findall(r"`((?:tests|benchmarks|docs|src|examples)/[\w./]*)`", path.read_text()):
            assert (ROOT / file).exists() or file.startswith("docs/_build"), f"{name} names {file}"


def test_the_version_to_cite_is_the_version():
    assert f"version = {{{ss.__version__}}}" in (ROOT / "README.md").read_text()


def test_the_gallery_has_ten_scripts():
    assert len(SCRIPTS) == 10
