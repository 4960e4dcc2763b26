"""Resolution of names on the command line: the user's own callables, and networks of libraries."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from skipscope import reference
from skipscope._errors import MissingExtra, SkipscopeError
from skipscope._model_calls import error_text

_OBJECT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def called(found: Callable[[], Any], name: str, what: str) -> Any:
    """Call what the user named; an error names the line that raised it."""
    try:
        return found()
    except SkipscopeError:
        raise
    # The user's own function may raise anything.
    except Exception as error:
        if isinstance(error, TypeError) and len(traceback.extract_tb(error.__traceback__)) == 1:
            raise SkipscopeError(
                what,
                f"{name} cannot be called without arguments ({error})",
                expected="a callable that returns an nn.Module"
                if what == "model"
                else "a callable that returns data",
                cure="write a small function without arguments that fills them in",
            ) from error
        raise SkipscopeError(
            what,
            f"{name} was called, and failed ({error_text(error)})",
            got=_source_line(error),
            cure="call it in Python and mend what fails",
        ) from error


def _source_line(error: BaseException) -> str:
    """Source line that raised the error, or that has a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}, {(error.text or '').strip()}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}, {last.line}"


def _file_of(name: str, what: str) -> Path | None:
    """The file in a name like ``train.py:make``, or None if the name is a module.

    Raises:
        SkipscopeError: the file does not exist.
    """
    path = Path(name.rpartition(":")[0])
    if path.suffix != ".py" or not path.stem.isidentifier():
        return None
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], 1)
        raise SkipscopeError(
            what,
            f"there is no file {path}",
            expected=str(path.with_name(near[0])) if near else None,
            got=name[:80],
            cure="run the command from the folder that holds it",
        )
    return path


def factory(found: Any, name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = called(found, name, "model")
        if not isinstance(model, nn.Module):
            raise SkipscopeError(
                "model",
                f"{name} did not return an nn.Module",
                expected="an nn.Module",
                got=type(model).__name__,
                cure="end the function with: return model",
            )
        return model

    return make


def named_model(name: str, said: list[str]) -> Any:
    prefix, _, rest = name.partition(":")
    if prefix in _LIBRARIES and rest:
        return _LIBRARIES[prefix](rest, said)
    if ":" in name:
        return resolve(name, "model")
    networks = reference.networks()
    if name in networks:
        return networks[name]
    raise SkipscopeError(
        "model",
        f"there is no network called {name!r:.60}",
        expected="one of " + ", ".join(networks),
        cure=_with_colon(name) or "your own: module:callable, e.g. my_package.models:make_model",
    )


def _with_colon(name: str) -> str | None:
    """Suggest a name with a colon for ``train.Net`` or ``train.py``, if that file is in this folder."""
    if name.endswith(".py") and Path(name).is_file():
        try:
            body = ast.parse(Path(name).read_bytes()).body
        # Importing the file will report what is wrong.
        except (SyntaxError, ValueError, OSError):
            body = []
        kinds = (ast.ClassDef, ast.FunctionDef)
        names = [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"]
        return f"name what makes the model, after a colon: {name}:{' or :'.join(names[:3]) or 'NAME'}"
    module, _, attribute = name.rpartition(".")
    if module and Path(*module.split(".")).with_suffix(".py").is_file():
        return f"a colon before the name: {module}:{attribute}"
    return None


def resolve(name: str, what: str) -> Any:
    """Import ``module:callable``. Only command-line arguments are imported, never names from loaded files."""
    if (file := _file_of(name, what)) is not None:
        sys.path.insert(0, str(file.parent.resolve()))
        name = f"{file.stem}:{name.rpartition(':')[2]}"
    if not _OBJECT.fullmatch(name):
        raise SkipscopeError(
            what,
            f"{name!r:.80} is not module:callable",
            expected="e.g. my_package.models:make_model",
            got=name[:80],
        )
    try:
        return pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        missing, module = error.name or "", name.partition(":")[0]
        if module == missing or module.startswith(missing + "."):
            raise SkipscopeError(
                what,
                f"there is no module {missing}",
                got=name,
                cure="run the command from the folder that holds it, or install it",
            ) from error
        raise SkipscopeError(
            what,
            f"importing {module} failed: it needs {missing}, which is not installed",
            got=name,
            cure=f"install what brings {missing}",
        ) from error
    except AttributeError as error:
        names = [n for n in dir(error.obj) if not n.startswith("_")]
        near = difflib.get_close_matches(error.name or "", names, 3)
        raise SkipscopeError(
            what,
            f"the module has no such name ({error})",
            expected=" or ".join(near) or None,
            got=name,
            cure="look for the name in the module, and how it is spelt",
        ) from error
    # The user's own module may raise anything while it is imported.
    except Exception as error:
        raise SkipscopeError(
            what,
            f"importing {name} failed ({type(error).__name__}: {error})",
            got=_source_line(error),
            cure="import the module in Python and mend what fails",
        ) from error


def _timm(name: str, said: list[str]) -> Callable[[], nn.Module]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise MissingExtra("model", "timm") from error
    said.append(f"timm:{name} has random weights (nothing is downloaded)")
    return lambda: _built("timm", name, lambda: timm.create_model(name, pretrained=False))


def _torchvision(name: str, said: list[str]) -> Callable[[], nn.Module]:
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise MissingExtra("model", "torchvision") from error
    said.append(f"torchvision:{name} has random weights (nothing is downloaded)")
    return lambda: _built("torchvision", name, lambda: models.get_model(name, weights=None))


def _hf(name: str, said: list[str]) -> Callable[[], nn.Module]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra("model", "transformers") from error
    if name in transformers.CONFIG_MAPPING:
        said.append(f"hf:{name} is the default configuration with random weights")

        def build() -> nn.Module:
            config = transformers.AutoConfig.for_model(name)
            for kind in (
                "AutoModelForCausalLM",
                "AutoModelForMaskedLM",
                "AutoModelForImageClassification",
                "AutoModel",
            ):
                try:
                    return getattr(transformers, kind).from_config(config)
                except ValueError:
                    continue
            raise ValueError("no model class takes this configuration")

        return lambda: _built("hf", name, build)
    # Without this option transformers asks at a terminal whether code of the repository may run.
    load = transformers.AutoModel.from_pretrained
    return lambda: _built("hf", name, lambda: load(name, trust_remote_code=False))


def _built(library: str, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    # Each library raises its own type of error for a wrong name.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SkipscopeError("model", f"{library} cannot build {name!r:.60} ({first})") from error


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}
