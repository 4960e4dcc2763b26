"""The command line as a person uses it: real processes, real files; errors in words, never a traceback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import skipscope as ss
from skipscope import SkipscopeError
from skipscope.cli import _command_subject

MODELS = """
import skipscope as ss
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    def forward(self, x):
        return x + self.f(x)

def make():
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))

def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

def fails():
    return {}["width"]

@ss.objective
def unlucky(model, batch):
    return {}["weights"]

def needs_an_argument(n):
    return make()

def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(48, 8, generator=g), torch.randint(0, 3, (48,), generator=g)

def nan_batch():
    x, y = batch()
    return x * float("nan"), y

def two_in_a_list():
    return [batch(), batch()]

def wrong_shape():
    x, y = batch()
    return x[:, :5], y

def empty():
    return []

number = 3
raise_on_import = None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(MODELS)
    (folder / "ends.py").write_text("import sys\ndef make():\n    sys.exit(3)\n")
    (folder / "syntax.py").write_text("def make(:\n")
    (folder / "broken.py").write_text("import a_package_that_is_not_there\n")
    return folder


def skipscope(folder, *words):
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "skipscope", *words],
        cwd=folder, capture_output=True, text=True, timeout=280, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


BAD = {
    "no such network": (["flow", "alexnet-999"], "one of plain"),
    "no such module": (["flow", "nowhere:make", "--data", "mine:batch"], "there is no module nowhere"),
    "no such callable": (["flow", "mine:nothing", "--data", "mine:batch"], "no such name"),
    "its import fails": (["flow", "broken:make", "--data", "mine:batch"], "a_package_that_is_not_there"),
    "not a module": (["flow", "mine:batch", "--data", "mine:batch"], "nn.Module"),
    "needs arguments": (
        ["flow", "mine:needs_an_argument", "--data", "mine:batch"],
        "a small function without arguments",
    ),
    "it fails": (["flow", "mine:fails", "--data", "mine:batch"], "KeyError: 'width'"),
    "its line": (["flow", "mine:fails", "--data", "mine:batch"], "mine.py:"),
    "its data fail": (["flow", "mine:make", "--data", "mine:fails"], "mine:fails was called, and failed"),
    "misspelt": (["flow", "mine:mak", "--data", "mine:batch"], "expected: make"),
    "a dot for the colon": (
        ["flow", "mine.make", "--data", "mine:batch"],
        "a colon before the name: mine:make",
    ),
    "its syntax is wrong": (["flow", "syntax:make", "--data", "mine:batch"], "syntax.py:1, def make(:"),
    "a broken file without a name": (["flow", "syntax.py", "--data", "mine:batch"], "syntax.py:NAME"),
    "a file without a name": (["flow", "mine.py", "--data", "mine:batch"], "mine.py:Block or :make"),
    "its loss fails": (
        ["flow", "mine:make", "--data", "mine:batch", "--loss", "mine:unlucky"],
        "your own code failed (KeyError: 'weights')\n  got:      mine.py:",
    ),
    "a file": (
        ["flow", "./models/mine.py:make", "--data", "mine:batch"],
        "there is no file models/mine.py",
    ),
    "a misspelt file": (["flow", "mnie.py:make", "--data", "mine:batch"], "expected: mine.py"),
    "code as a name": (["flow", "__import__('os').system('true'):x"], "is not module:callable"),
    "no data": (["flow", "mine:make"], "--data"),
    "no such loss": (["flow", "mine:make", "--data", "mine:batch", "--loss", "focal"], "cross_entropy"),
    "not a loss": (["flow", "mine:make", "--data", "mine:batch", "--loss", "relu"], "cross_entropy"),
    "an ambiguous list": (["flow", "mine:make", "--data", "mine:two_in_a_list"], "ss.batches"),
    "no batches": (["flow", "mine:make", "--data", "mine:empty"], "empty"),
    "wrong shape": (["flow", "mine:make", "--data", "mine:wrong_shape"], "(48, 5)"),
    "nan": (["compare", "mine:make", "--data", "mine:nan_batch"], "not finite"),
    "a shape that is too large": (
        ["find", "mine:make", "--input", "9999999x9999999x9999999x9999999"],
        "do not fit into memory",
    ),
    "bad shape words": (["find", "mine:make", "--input", "8x-3"], "8x3x224x224"),
    "cannot write": (["flow", "mine:make", "--data", "mine:batch", "--out", "/proc/nope"], "--out"),
    "no grid": (["landscape", "mine:make", "--data", "mine:batch", "--grid", "9y5"], "51x31"),
    "no line": (
        ["landscape", "mine:make", "--data", "mine:batch", "--grid", "9x5", "--line"],
        "this is not a grid",
    ),
    "nothing saved": (["show", "nowhere.json"], "nowhere.json"),
    "no such loss of one's own": (
        ["flow", "mine:make", "--data", "mine:batch", "--loss", "mine:los"],
        "no such name",
    ),
    "no such device": (
        ["flow", "mine:make", "--data", "mine:batch", "--device", "gpu"],
        "cannot be moved to gpu",
    ),
    "it ends the program": (["flow", "ends:make", "--data", "mine:batch"], "__name__ == '__main__'"),
    "no weights": (["flow", "mine:make", "--data", "mine:batch", "--weights", "no.pt"], "no.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_words(name, folder):
    words, cure = BAD[name]
    done = skipscope(folder, *words)
    assert done.returncode == 1, done.stderr
    assert cure in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_refused_command_leaves_no_empty_folder(tmp_path, folder):
    done = skipscope(tmp_path, "find", "nowhere:make")
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    done = skipscope(tmp_path, "find", "nowhere:make", "--out", "mine")
    assert done.returncode == 1 and (tmp_path / "mine").is_dir()


def test_a_command_without_a_loss_needs_no_target(monkeypatch, tmp_path):
    from skipscope.cli import Source
    from skipscope.cli._command_subject import load_subject

    code = MODELS + "\ndef inputs_only():\n    return {'input': torch.ones(2, 8)}\n"
    (tmp_path / "without_target.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Source(data="without_target:inputs_only")
    subject = load_subject("without_target.py:make", source, uses_loss=False)
    assert set(subject.inputs) == {"input"} and subject.loss is None
    assert not [sentence for sentence in subject.said if sentence.startswith("loss:")]
    with pytest.raises(SkipscopeError, match="without labels"):
        load_subject("without_target.py:make", source)


def test_options_that_are_handed_on(capsys, monkeypatch):
    from skipscope.cli import _run, app

    seen = []
    monkeypatch.setattr("skipscope.cli._run", lambda *args, **options: seen.append((args, options)))
    app(["compare", "resnet20", "--seeds", "5"], result_action="return_value")
    assert seen[0][1]["seeds"] == 5
    app(["--help"], result_action="return_value")
    assert "--install-completion" in capsys.readouterr().out
    assert callable(_run)


def test_ctrl_c_says_what_was_kept(folder):
    (folder / "stops.py").write_text("def make():\n    raise KeyboardInterrupt\n")
    done = skipscope(folder, "flow", "stops:make", "--data", "mine:batch")
    assert done.returncode == 130 and "skipscope: stopped" in done.stderr and "Traceback" not in done.stderr


def test_data_that_draw_are_the_same_again(folder):
    words = ["def batch():", "    import torch", "    return torch.randn(16, 8), torch.randint(0, 3, (16,))"]
    (folder / "drawn.py").write_text("\n".join(words))
    first, again = (
        skipscope(folder, "flow", "mine:make", "--data", "drawn:batch", "--json") for _ in range(2)
    )
    assert first.returncode == 0 and json.loads(first.stdout) == json.loads(again.stdout)


def test_weights_that_hold_code_are_not_run(folder):
    import torch

    class Harmful:
        def __reduce__(self):
            return (os.system, (f"touch {folder / 'harmed'}",))

    torch.save({"state_dict": Harmful()}, folder / "harmful.pt")
    done = skipscope(folder, "flow", "mine:make", "--data", "mine:batch", "--weights", "harmful.pt")
    assert done.returncode == 1
    assert not (folder / "harmed").exists()


def test_the_code_of_a_repository_is_never_run(monkeypatch):
    from types import SimpleNamespace

    from skipscope.cli._named import named_model

    asked = []
    model = SimpleNamespace(from_pretrained=lambda name, **options: asked.append((name, options)))
    library = SimpleNamespace(CONFIG_MAPPING={}, AutoModel=model)
    monkeypatch.setitem(sys.modules, "transformers", library)
    named_model("hf:owner/name", [])()
    assert asked == [("owner/name", {"trust_remote_code": False})]


def test_find_flow_paths_and_show(folder):
    out = ("--out", "results")
    found = skipscope(folder, "find", "mine:make", "--input", "4x8", *out)
    assert found.returncode == 0, found.stderr
    assert "identity" in found.stdout
    flow = skipscope(folder, "flow", "mine:make", "--data", "mine:batch", *out)
    assert flow.returncode == 0, flow.stderr
    assert "cross_entropy, guessed" in flow.stderr
    assert str(folder / "results" / "flow.html") in flow.stdout
    assert (folder / "results" / "flow.html").stat().st_size < 8_000_000
    shown = skipscope(folder, "show", "results/flow.json")
    assert shown.stdout.strip()[:60] == flow.stdout.strip()[:60]
    paths = skipscope(folder, "paths", "mine:make", "--data", "mine:batch", "--json")
    assert len(json.loads(paths.stdout)["norms"]) == 3


def test_compare_ones_own_model(folder):
    done = skipscope(
        folder, "compare", "mine:make", "--data", "mine:batch", "--quick", "--steps", "20",
        "--kinds", "rezero,dense", "--out", "mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training:" in done.stderr
    result = json.loads((folder / "mine" / "compare.json").read_text())["data"]
    assert len(result["found"]["with"]["entries"]) == 2
    assert set(result["flow"]) == {"with", "with, detached", "without", "rezero"}
    assert done.stdout.startswith("kinds of shortcut\n") and "(dense was left out: " in " ".join(
        done.stdout.split()
    )
    page = (folder / "mine" / "compare.html").read_text()
    assert len(page) < 8_000_000
    assert result["summary"][0] in page.replace("&#39;", "'")


def test_compare_a_model_without_shortcuts(folder):
    done = skipscope(
        folder, "compare", "mine:plain", "--data", "mine:batch", "--no-train", "--quick", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {t["name"]: t["meaning"] for t in result["twins"]} == {
        "without": "as built",
        "with": "shortcuts added",
    }
    assert result["training"] is None


def test_the_surface_that_was_asked_for(folder):
    options = ("mine:make", "--data", "mine:batch", "--strategy", "plain")
    pytest.importorskip("zarr")
    done = skipscope(
        folder, "landscape", *options, "--grid", "7x5", "--normalize", "layer", "--samples", "20", "--l2", "0.1", "--batch-norm", "batch",
        "--precision", "bf16", "--out", "asked",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "asked" / "landscape.json").read_text())
    assert "7 x 5" in done.stdout and '"layer"' in json.dumps(found) and "bf16" in json.dumps(found)
    line = skipscope(folder, "landscape", *options, "--grid", "9", "--line", "--json", "--out", "line")
    plain = json.loads(line.stdout)
    assert len(plain["alphas"]) == 9 and plain["betas"] == [] and len(plain["values"]) == 9


def test_of_several_ranks_one_speaks(folder):
    pytest.importorskip("zarr")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "skipscope", "landscape", "mine:make", "--data", "mine:batch", "--grid", "5", "--out", "ranks"],
            cwd=folder, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for rank in range(2)
    ]  # fmt: skip
    (said, notes), (silent, nothing) = (rank.communicate(timeout=300) for rank in ranks)
    assert all(rank.returncode == 0 for rank in ranks), notes + nothing
    assert "loss surface" in said and "guessed" in notes
    assert "loss surface" not in silent + nothing and "guessed" not in nothing


def test_the_first_line_does_not_wait_for_torch(folder):
    code = (
        "import sys, builtins\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': print('importing torch', file=sys.stderr)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "sys.argv = ['skipscope', 'find', 'mine:make', '--input', '4x8', '--out', 'first']\n"
        "from skipscope.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=280
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "skipscope find mine:make ..." and "importing torch" in lines[1:]


def test_each_command_and_model_has_a_folder_and_nothing_is_overwritten(folder):
    for _ in range(2):
        done = skipscope(folder, "find", "mine:make", "--input", "4x8", "--save", "arcs.svg")
        assert done.returncode == 0, done.stderr
    made = sorted(p.name for p in (folder / "skipscope-out" / "find-mine-make").iterdir())
    assert made == ["find-2.html", "find-2.json", "find.html", "find.json", "play.html"]
    assert (folder / "arcs.svg").read_text().startswith("<?xml")
    shown = skipscope(folder, "show", *(f"skipscope-out/find-mine-make/{n}.json" for n in ("find", "find-2")))
    assert shown.returncode == 0, shown.stderr
    assert "They agree in every number" in shown.stdout


LOUD = {
    "print": "print('hello')",
    "a child process": "os.system('echo hello')",
    "a library in C": "os.write(1, b'hello')",
    "the interpreter's own": "sys.__stdout__.write('hello')",
    "as the process ends": "atexit.register(print, 'hello')",
    "a thread, until the process ends": (
        "threading.Thread(target=lambda: [print('hello', flush=True) for _ in range(10**9)], daemon=True).start()"
    ),
    "then closes what it printed to": "print('hello', flush=True); sys.stdout.close()",
}


@pytest.mark.parametrize("how", LOUD)
def test_json_is_alone_on_standard_output_whatever_a_factory_prints(folder, how):
    (folder / "loud.py").write_text(
        f"import atexit, os, sys, threading\nfrom mine import *\ndef loud():\n    {LOUD[how]}\n    return make()\n"
    )
    done = skipscope(folder, "find", "loud:loud", "--input", "4x8", "--json")
    assert len(json.loads(done.stdout)["entries"]) == 2
    assert "hello" in done.stderr
    assert "resnet20" in json.loads(skipscope(folder, "find", "--list", "--json").stdout)


def test_json_alone_needs_no_folder_that_can_be_written(tmp_path):
    (tmp_path / "skipscope-out").write_text("a file where the folder would be")
    done = skipscope(tmp_path, "find", "resnet20", "--json")
    assert len(json.loads(done.stdout)["entries"]) == 9 and list(tmp_path.iterdir()) == [
        tmp_path / "skipscope-out"
    ]


ENDS = {
    "sys.exit in forward": (
        "def make():\n    m = Block()\n    m.forward = lambda x: sys.exit(0)\n    return m\n",
        "sys.exit(0)",
    ),
    "sys.exit in an import": ("sys.exit(0)\n", "sys.exit(0)"),
    "arguments read in an import": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', required=True)\np.parse_args()\n",
        "p.parse_args()",
    ),
    "an error that is no Exception": (
        "class Stop(BaseException):\n    pass\ndef make():\n    raise Stop('stopped')\n",
        "Stop: stopped",
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_own_code_that_ends_the_program_is_named(folder, how):
    code, line = ENDS[how]
    (folder / "ending.py").write_text(f"import sys\nfrom mine import Block\n{code}")
    done = skipscope(folder, "find", "ending:make", "--input", "4x8")
    assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr


def test_a_factory_may_change_the_working_folder(tmp_path, folder):
    code = "import os\nimport mine\ndef make():\n    os.chdir('/')\n    return mine.make()\n"
    (folder / "moves.py").write_text(code)
    words = ["find", "moves:make", "--input", "4x8", "--out", "moved", "--save", "moved.csv"]
    assert skipscope(folder, *words).returncode == 0
    assert (folder / "moved" / "find.json").exists() and (folder / "moved.csv").exists()


def in_a_shell(folder, line):
    command = f"{sys.executable} -m skipscope find mine:make --input 4x8 --out shell"
    return subprocess.run(
        ["bash", "-c", line.format(command)], cwd=folder, capture_output=True, text=True, timeout=280
    )


def test_streams_that_are_closed_or_full_cost_nothing(folder):
    for line in ("{} <&-", "{} 2>/dev/full", "{} --json 2>/dev/full"):
        done = in_a_shell(folder, line)
        assert done.returncode == 0, (line, done.stderr)
    assert (folder / "shell" / "find-3.json").exists()


def test_a_working_folder_that_is_gone(tmp_path):
    line = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m skipscope --version"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr  # torch itself cannot compute there


def test_the_question_may_be_left_unanswered(folder):
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        words = ["-m", "skipscope", "find", "mine:make", "--input", "4x8", "--out", "asked"]
        os.execv(sys.executable, [sys.executable, *words])
    said = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the child has ended
            break
        said += part
        if said.endswith(b"[y/N] "):
            os.write(terminal, b"\x04")  # Ctrl-D
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said


def test_a_file_and_a_loss_of_ones_own(folder):
    (folder / "own.py").write_text("def loss(output, target):\n    return output.square().mean()\n")
    done = skipscope(
        folder,
        "flow",
        "mine.py:make",
        "--data",
        "mine.py:batch",
        "--loss",
        "own:loss",
        "--device",
        "cpu",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["boundaries"]


def test_work_is_kept_when_standard_output_is_full_or_closed(folder):
    command = [sys.executable, "-m", "skipscope", "find", "mine:make", "--input", "4x8", "--out"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "full"], cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, timeout=280
        )
    assert done.returncode == 1 and "what was saved before is kept" in done.stderr
    assert (folder / "full" / "find.json").exists()


def test_control_characters_never_reach_the_terminal(folder):
    escape = chr(27)
    (folder / "sly.py").write_text(
        "import torch\nfrom torch import nn\nfrom mine import batch\n"
        "def make():\n    m = nn.Sequential()\n"
        f"    m.add_module('a{escape}[2J{escape}]52;c;cm0K{chr(7)}', nn.Linear(8, 3))\n    return m\n"
        f"def fails():\n    raise ValueError('{escape}[2J')\n"
    )
    for words in (
        ["flow", "sly:make", "--data", "mine:batch"],
        ["flow", "sly:fails", "--data", "mine:batch"],
    ):
        done = skipscope(folder, *words, "--out", "sly")
        assert escape not in done.stdout + done.stderr
    assert skipscope(folder, "flow", f"a{escape}[2J", "--data", "mine:batch").stderr.count(escape) == 0


NO_FILES = {
    "fifo": "a pipe, a socket or a device",
    "socket": "a pipe, a socket or a device",
    "device": "a pipe, a socket or a device",
    "without a size": "empty, or a file of the system",
    "folder": "is a folder without",
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_shown(tmp_path, monkeypatch, kind):
    """Each of these was read for ever, or would be: reading has to be refused at once."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    paths = {"device": "/dev/zero", "without a size": "/proc/kmsg"}
    path = Path(paths.get(kind, "here"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("here")
    elif kind == "folder":
        path.mkdir()
    if not path.exists():
        pytest.skip(f"this system has no {path}")
    with pytest.raises(ss.SkipscopeError, match=NO_FILES[kind]):
        ss.load(path)
    if kind != "folder":
        with pytest.raises(ss.SkipscopeError, match=NO_FILES[kind]):
            _command_subject._load_weights(None, path)


def test_a_fifo_is_not_shown(folder):
    os.mkfifo(folder / "fifo")
    for words in (["show", "fifo"], ["find", "mine:make", "--input", "4x8", "--weights", "fifo"]):
        done = skipscope(folder, *words)
        assert done.returncode == 1 and "a pipe, a socket or a device" in done.stderr


@pytest.mark.parametrize("words", ["--help", "find --help", "--version", "find --list"])
def test_a_reader_that_has_gone_is_no_error(words):
    line = f"{sys.executable} -m skipscope {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


def test_an_option_that_was_not_understood_is_one_without_a_reader_too():
    line = f"{sys.executable} -m skipscope find --nosuch 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", line], timeout=280).returncode != 0


@pytest.mark.parametrize("command", [("find", "resnet20"), ("flow", "plain"), ("book", "--seeds", "2")])
def test_a_command_imports_nothing_slow_that_its_answer_does_not_need(command, tmp_path):
    slow = {
        "scipy",
        "sympy",
        "matplotlib",
        "pandas",
        "zarr",
        "torch._dynamo",
        "torch.fx.experimental.symbolic_shapes",
    }
    code = (
        "import atexit, sys, torch; before = set(sys.modules); from skipscope.cli import main\n"
        f"atexit.register(lambda: print('LOADED', sorted({slow!r} & (set(sys.modules) - before))))\n"
        f"sys.argv = ['skipscope', *{command!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("LOADED []\n"), done.stdout[-300:] + done.stderr[-2000:]
