"""Reproduce the papers behind the lecture: ``python -m reproductions`` lists them, ``... NAME`` runs one.

``all`` runs every one; a run that was stopped goes on where it was. ``pages`` writes docs/papers from the results.
"""

import importlib
import json
import pkgutil

import torch

import reproductions
from reproductions import _pages, _report


def names() -> list[str]:
    """Every reproduction, in alphabetical order."""
    return [m.name for m in pkgutil.iter_modules(reproductions.__path__) if not m.name.startswith("_")]


def main(words: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    assert __doc__ is not None
    arguments = _report.parser(names(), __doc__).parse_args(words)
    if arguments.name is None:
        for name in names():
            print(f"{name:<24} {importlib.import_module(f'reproductions.{name}').REPRODUCTION.title}")
        return
    if arguments.name == "pages":
        for path in _pages.write():
            print(path)
        return
    torch.set_num_threads(arguments.threads)
    for name in names() if arguments.name == "all" else [arguments.name]:
        module = importlib.import_module(f"reproductions.{name}")
        options = _report.options_of(arguments, module)
        if arguments.judge:
            content = json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))
            print(_report.judge(name, module, content, options.out))
        else:
            print(_report.run(name, module, options))


if __name__ == "__main__":
    main()
