"""Files: cut, damaged, hostile or of the future; a process that is killed; a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from report import samples
from report.browser import CHROMIUM, Browser
from report.payloads import PAYLOADS
from skipscope import _files, _result
from skipscope.cli import Output, _command_subject, _commands, _named
from skipscope.monitor.history import _history_reader, _row_files
from skipscope.report import _page
from skipscope.surfaces.grids import _surface_store
from trust._hazard import Hazard, attempt, replaced
from trust._model import batch, network


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="skipscope-trust-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _results() -> list[Any]:
    return [result for result in samples.everything() if len(_result.dumps(result)) < 60_000]


# --- saved results ---


def truncations(count: int) -> Iterator[str | None]:
    """A saved result cut after a byte: refused in words."""
    texts = [_result.dumps(result) for result in _results()]
    cuts = [(i, at) for i, text in enumerate(texts) for at in range(len(text))]
    random.Random(0).shuffle(cuts)
    for i, at in cuts[:count]:
        loaded, error = attempt(lambda text=texts[i], at=at: _result.loads(text[:at]), ss.SkipscopeError)
        yield None if error is not None else f"{type(loaded).__name__} cut after {at} bytes was read"


def _reads_what_is_there():
    first = _results()[0]
    return replaced((_result, "loads", lambda text, source="text": first))


def flips(count: int) -> Iterator[str | None]:
    """A saved result with one bit flipped: refused, said, or exactly what was saved."""
    draw, texts = random.Random(0), [(r, _result.dumps(r).encode()) for r in _results()]
    for _ in range(count):
        result, text = draw.choice(texts)
        at, bit = draw.randrange(len(text)), 1 << draw.randrange(8)
        damaged = text[:at] + bytes([text[at] ^ bit]) + text[at + 1 :]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded, error = attempt(
                lambda damaged=damaged: _result.loads(damaged.decode()), ss.SkipscopeError, UnicodeDecodeError
            )
        silent = error is None and not said
        same = silent and _result.finite(loaded.to_dict()) == _result.finite(result.to_dict())
        yield (
            f"{type(result).__name__}: byte {at} flipped, and read without a word"
            if silent and not same
            else None
        )


def _no_checksum():
    return replaced((_result, "_checksum", lambda data: ""))


def _monitored(folder: Path) -> Path:
    """The folder of a run that was resumed: rows of gradients and of flow, events, two files of each."""
    model, (x, y) = network(2), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        with ss.watch(model, optimizer, folder=folder, resume=True, flow_every=2):
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return folder


def folder_flips(count: int) -> Iterator[str | None]:
    """A monitor's folder with one bit flipped: refused, said in a note, or exactly what was recorded."""
    with _folder() as parent:
        folder = _monitored(parent / "run")
        whole = ss.load(folder)
        contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        bits = [(path, bit) for path, data in contents.items() for bit in range(8 * len(data))]
        # Neither a first bit nor the same bit of every byte: the step is odd.
        for path, bit in bits[3 :: max(1, len(bits) // count) | 1]:
            damaged = bytearray(contents[path])
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            history, error = attempt(lambda: ss.load(folder), ss.SkipscopeError)
            path.write_bytes(contents[path])
            silent = error is None and set(history.notes) <= set(whole.notes)
            same = silent and _result.finite(history.to_dict()) == _result.finite(whole.to_dict())
            yield (
                f"bit {bit} of {path.name} flipped, and read without a word" if silent and not same else None
            )


def _rows_unchecked():
    return replaced(
        (_row_files, "_is_as_written", lambda row: True),
        (_row_files, "unsealed", json.loads),
        (_history_reader, "unsealed", json.loads),
    )


def wrong_types(count: int) -> Iterator[str | None]:
    """A saved result in which one value has another type: refused, or it loads and prints, also as plain data."""
    draw, others = random.Random(0), (None, "text", -1, 1e400, [], {}, True, [[]], {"a": 1})
    contents = [json.loads(_result.dumps(result)) for result in _results()]
    for _ in range(count):
        content = json.loads(json.dumps(draw.choice(contents)))
        holder, key = draw.choice(list(_places(content["data"])))
        holder[key] = draw.choice(others)
        content.pop("sha256")
        loaded, error = attempt(lambda content=content: _result.loads(json.dumps(content)), ss.SkipscopeError)
        if error is None:
            try:
                json.dumps([str(loaded), _result.finite(loaded.to_dict())])
            except ss.SkipscopeError:
                pass
            except Exception as raw:
                yield f"{content['result']} with {key}={holder[key]!r} loads, and printing raises {type(raw).__name__}: {raw}"
                continue
        yield None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _trusts_types():
    def structure(text: str, source: str = "text") -> Any:
        content = json.loads(text)
        return _Careless(content["data"])

    return replaced((_result, "loads", structure))


class _Careless:
    """A result that believes what it is given."""

    def __init__(self, data: Any):
        self.data = data

    def to_dict(self) -> Any:
        return self.data

    def __str__(self) -> str:
        return " ".join(f"{key.upper()}: {value:.3f}" for key, value in self.data.items())


def full_disk(count: int) -> Iterator[str | None]:
    """A result saved where only so many bytes fit: the file before it stays whole, nothing is left beside it."""
    result = _results()[0]
    size, draw = len(_result.dumps(result)), random.Random(0)
    for _ in range(count):
        limit = draw.randrange(size)
        with _folder() as folder:
            result.save(folder / "flow.json")
            before = (folder / "flow.json").read_bytes()
            ended = _in_child(
                lambda folder=folder, limit=limit: _save_within(result, folder / "flow.json", limit)
            )
            files = sorted(path.name for path in folder.iterdir())
            if ended != 0:
                yield f"saving within {limit} bytes was not refused in words (exit {ended})"
            elif (folder / "flow.json").read_bytes() != before or files != ["flow.json"]:
                yield f"after {limit} bytes the file has changed, or others are there: {files}"
            else:
                yield None


def _save_within(result: Any, path: Path, limit: int) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _, error = attempt(lambda: result.save(path), ss.SkipscopeError)
    return 0 if error is not None else 1


def _in_child(work: Callable[[], int]) -> int:
    """Run ``work`` in a copy of this process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _writes_in_place():
    def write(path: Any, content: Any, *, operation: str = "save") -> Path:
        data = content.encode() if isinstance(content, str) else content
        try:
            with open(path, "wb", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise ss.SkipscopeError(operation, str(error)) from error
        return Path(path)

    return replaced((_files, "write_whole", write), (_result, "write_whole", write))


# --- stores of surfaces ---

GRID = 7


def _surface(store: Path | None) -> np.ndarray:
    torch.set_num_threads(1)
    return ss.landscape(network(2), batch(), F.cross_entropy, grid=GRID, strategy="plain", store=store).values


def killed(count: int) -> Iterator[str | None]:
    """A surface killed by SIGKILL at a random moment, run again: the bits of one run, and no litter."""
    draw, begun = random.Random(0), time.monotonic()
    with _folder() as folder:
        expected = _surface(folder / "whole.zarr")
        length = time.monotonic() - begun
        for i in range(count):
            store = folder / f"killed-{i}.zarr"
            child = os.fork()
            if child == 0:
                try:
                    _surface(store)
                finally:
                    os._exit(0)
            time.sleep(draw.random() * length)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            values, error = attempt(lambda store=store: _surface(store), ss.SkipscopeError)
            if error is not None:
                yield f"after kill {i} the store is refused: {error}"
            elif not np.array_equal(values, expected):
                yield f"after kill {i} the surface has other values"
            else:
                yield None
            shutil.rmtree(store, ignore_errors=True)


def _store_that_forgets():
    """A store whose chunks are read back with a bit that was not written."""
    original = _surface_store.Store.read_into

    def read_into(self, sheet):
        original(self, sheet)
        sheet.numbers[...] += 1e-9 if hasattr(sheet, "numbers") else 0

    def reread(self, unit, numbers, write=_surface_store.Store.write):
        write(self, unit, numbers * (1 + 1e-9))

    return replaced((_surface_store.Store, "write", reread), (_surface_store.Store, "read_into", read_into))


def damaged_chunks(count: int) -> Iterator[str | None]:
    """A finished store with one bit of a chunk flipped: computed again to the same bits, or said."""
    draw = random.Random(0)
    with _folder() as folder:
        expected = _surface(folder / "whole.zarr")
        chunks = [
            p.relative_to(folder / "whole.zarr")
            for p in (folder / "whole.zarr").rglob("*")
            if p.is_file() and "c" in p.parts and p.stat().st_size
        ]
        for i in range(count):
            store = folder / f"damaged-{i}.zarr"
            shutil.copytree(folder / "whole.zarr", store)
            path = store / draw.choice(chunks)
            data = bytearray(path.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(data))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values, error = attempt(lambda store=store: _surface(store), ss.SkipscopeError)
            wrong = error is None and not np.array_equal(values, expected)
            yield f"a flipped bit in {path.name} changed the surface" if wrong else None
            shutil.rmtree(store)


# --- code in data ---


class _Runs:
    """An object whose unpickling runs a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _pickles(flag: Path) -> list[bytes]:
    """Payloads that make ``flag`` when they are unpickled without care."""
    touch = f"touch {flag}"
    code = f"open({str(flag)!r}, 'w').close()"
    import builtins
    import subprocess

    objects = [
        _Runs(os.system, touch), _Runs(subprocess.call, touch.split()), _Runs(subprocess.getoutput, touch),
        _Runs(builtins.exec, code), _Runs(builtins.eval, f"open({str(flag)!r}, 'w')"), _Runs(open, str(flag), "w"),
        _Runs(os.mkdir, str(flag)), _Runs(getattr, _Runs(open, str(flag), "w"), "name"),
        _Runs(map, open, [str(flag)]), _Runs(shutil.copyfile, __file__, str(flag)),
    ]  # fmt: skip
    return [
        pickle.dumps(wrapped, protocol)
        for thing in objects
        for wrapped in (thing, {"state_dict": thing}, {"w": [thing, torch.zeros(1)]})
        for protocol in (2, 4)
    ]


def malicious_files(count: int) -> Iterator[str | None]:
    """A file that runs code when unpickled, given as weights or as a saved result under several endings."""
    with _folder() as folder:
        flag = folder / "ran"
        kinds = [
            (data, ending, given)
            for data in _pickles(flag)
            for ending in (".pt", ".bin", ".safetensors", ".json", ".html", "")
            for given in ("weights", "result")
        ]
        random.Random(0).shuffle(kinds)
        for i, (data, ending, given) in enumerate(kinds[:count]):
            path = folder / f"file{i}{ending}"
            if ending in {".pt", ".bin"} and i % 2:  # inside torch's own archive, as a checkpoint has it
                torch.save({"w": torch.zeros(1)}, path)
                _put_in_archive(path, data)
            else:
                path.write_bytes(data)
            read = (
                (lambda path=path: _command_subject._load_weights(nn.Linear(1, 1), path))
                if given == "weights"
                else (lambda path=path: ss.load(path))
            )
            _, error = attempt(read, ss.SkipscopeError)
            ran = flag.exists()
            with contextlib.suppress(OSError):
                flag.rmdir() if flag.is_dir() else flag.unlink()
            yield (
                f"{given} in {path.name} ran code"
                if ran
                else None
                if error is not None
                else f"{path.name} was taken for {given}"
            )


def _put_in_archive(path: Path, data: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


def _unpickles():
    original = torch.load

    def load(path: Path, **options: Any) -> Any:
        return original(path, **{**options, "weights_only": False})

    return replaced((_command_subject.torch, "load", load))


HOSTILE_NAMES = [
    "os:system('id')", "os:system.__call__('id')", "__import__('os'):system", "os;import sys:exit", "os:system;id", "a b:c",
    "../../etc/passwd:x", "/etc/passwd:x", "os:__class__.__init__.__globals__['x']", "builtins:eval('1')", "x:y:z", ":", "a:", ":b",
    "a..b:c", ".a:b", "a.:b", "a:b.", "a:b..c", "a:b()", "a:b[0]", "a:b\n", "a\x00:b", "a:b c", "1a:b", "a:1b", "a-b:c", "a:b-c",
    "${HOME}:x", "`id`:x", "$(id):x", "a:b|c", "a:b&c", "a:b>c", "a:b<c", "a:b'c", 'a:b"c', "a:b\\c", "é\u202e:b", "a:{b}",
    "timm:../../x", "file:///etc/passwd", "http://example.invalid/x:y", "a%2eb:c", "a:b%00", "lambda:0", "a:lambda x: x",
]  # fmt: skip


def hostile_names(count: int) -> Iterator[str | None]:
    """A name on the command line, and the same text in a saved result: refused, or only text; nothing is imported or run."""
    import sys

    for i, name in enumerate([HOSTILE_NAMES[0], *HOSTILE_NAMES[:count]]):
        before = set(sys.modules)
        _, error = attempt(lambda name=name: _named.resolve(name, "model"), ss.SkipscopeError)
        content = json.loads(_result.dumps(_results()[0])) | {"result": name}
        content.pop("sha256")
        _, second = attempt(lambda content=content: _result.loads(json.dumps(content)), ss.SkipscopeError)
        new = {module for module in set(sys.modules) - before if not module.startswith("skipscope")}
        if i == 0:  # what skipscope itself loads at its first error
            continue
        yield (
            None
            if error is not None and second is not None and not new
            else f"{name!r} was taken: {error}, {second}, imported {sorted(new)[:3]}"
        )


def _any_name():
    return replaced(
        (_named, "_OBJECT", re.compile("(?s).*")), (_named.pkgutil, "resolve_name", lambda name: name)
    )


def folders(count: int) -> Iterator[str | None]:
    """The folder of a command for a hostile MODEL: inside the folder for results."""
    names = [
        "../x", "../../etc", "/etc/cron.d/x", "..", ".", "", "a/../../b", "~/x", "a\\..\\b", "C:\\x", "a\x00b", "\n", " ", "-rf", "--out", "con", "nul",
        "a" * 120, "x:y/../../z", "timm:../../../x", "hf:../x", "....//x", "%2e%2e/x", "é/ü", "\u202e", "\ufeff..", ". .", ".git/hooks/x", "$HOME", "`id`",
        "a;b", "a|b", "*", "?", "<x>", '"x"', "'x'", "\t..\t/", "//x", "a//..//..//b",
    ]  # fmt: skip
    with _folder() as folder, replaced((_commands, "DEFAULT_FOLDER", folder / "out")):
        for name in names[:count]:
            made, error = attempt(
                lambda name=name: _commands._folder(Output(), "find", name), ss.SkipscopeError
            )
            inside = made is not None and made.resolve().parent == (folder / "out").resolve()
            yield None if inside or error is not None else f"{name!r} leads to {made}"


def _keeps_names():
    return replaced((_commands.re, "sub", lambda pattern, by, text: text))


# --- pages ---

RAN = "Boolean(window.pwned || document.documentElement.dataset.pwned)"


def pages(count: int) -> Iterator[str | None]:
    """A page in which every text of a result holds a payload, opened in Chromium without the page's own policy."""
    with _folder() as folder, Browser() as browser, replaced((_page, "MOST", 10**9)):
        for i in range(count):
            payload = PAYLOADS[i % len(PAYLOADS)]
            path = samples.flow(depth=4, text=lambda text, payload=payload: text + payload).save(
                folder / "page.html"
            )
            text = re.sub(
                r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8")
            )
            path.write_text(text, encoding="utf-8")
            page = browser.open(path)
            page.run("new Promise(done => setTimeout(done, 30))")
            yield (
                f"{payload!r} ran"
                if page.run(RAN)
                else f"{payload!r} asked for {page.requests}"
                if page.requests
                else None
            )


@contextlib.contextmanager
def _escapes_nothing() -> Iterator[None]:
    save = _result.Result.save

    def unescaped(self, path, **options):
        made = save(self, path, **options)
        made.write_text(
            made.read_text(encoding="utf-8").replace("&lt;", "<").replace("&gt;", ">"), encoding="utf-8"
        )
        return made

    with replaced((_result.Result, "save", unescaped)):
        yield


FILES = (
    Hazard("A saved result that was cut short", "one cut at one byte", truncations, _reads_what_is_there, 26000, 200),
    Hazard("A saved result that was damaged", "one flipped bit", flips, _no_checksum, 3000, 60),
    Hazard("A monitor's folder that was damaged", "one flipped bit", folder_flips, _rows_unchecked, 4000, 60),
    Hazard("A saved result with other types in it", "one value of another type, loaded and printed", wrong_types, _trusts_types, 1500, 40),
    Hazard("A disk that is full", "one result saved where too few bytes fit", full_disk, _writes_in_place, 100, 4),
    Hazard("A process that is killed", "one SIGKILL while a surface is computed, then run again", killed, _store_that_forgets, 500, 3),
    Hazard("A store that was damaged", "one flipped bit in a chunk of a surface", damaged_chunks, _store_that_forgets, 100, 3),
    Hazard("Weights and results that hold code", "one file that runs code when unpickled", malicious_files, _unpickles, 400, 40),
    Hazard("Names that hold code", "one text as MODEL and as the kind of a saved result", hostile_names, _any_name, len(HOSTILE_NAMES), 12),
    Hazard("Paths that lead out of the folder", "one name of a MODEL", folders, _keeps_names, 40, 12),
    Hazard("Text that runs in a page", "one payload in every text of a page in Chromium", pages, _escapes_nothing, len(PAYLOADS), 4,
           needs="" if CHROMIUM else "chromium is not installed"),
)  # fmt: skip
