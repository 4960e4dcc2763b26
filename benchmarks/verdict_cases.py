"""The verdict on stock models, where a false alarm is the worst fault, and on broken ones, where a miss is.

``python -m benchmarks.verdict_cases FILE PART`` measures what ``FILE`` does not hold yet; PART is ``held-out``,
``seen``, ``sizes`` (stock models at half and double size, 2 to 1,000 classes), ``flips`` (other batches and seeds) or
``watched`` (the stock models under ``watch``, with the flow and without).
``figures()`` sums up what is kept in ``results/verdict_cases_rows.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import skipscope as ss
from benchmarks import _faults, _hosts

ROWS = Path(__file__).parent / "results" / "verdict_cases_rows.json"
SAMPLES = 4
# The fixed sample of sizes, classes and seeds is drawn with this.
SEED = 31
# Each with weights and a batch of its own; the state may differ from that of most in 2 of 100.
SEEDS = 10
SHRINKING = ("torchvision/squeezenet1_1", "torchvision/alexnet")


def host_row(host: _hosts.Host, size: int, classes: int, seed: int = 0) -> dict:
    """The verdict on one stock model, freshly made."""
    torch.manual_seed(seed)
    model = host.make(classes, size)
    data = _hosts.batch(host, SAMPLES, min(classes, 10), size, seed=seed)
    row = {"what": "host", "name": host.name, "size": size, "classes": classes, "seed": seed}
    verdict, seconds = _verdict(model, data, _hosts.loss_of(host))
    return row | verdict | {"right": verdict["state"] == "healthy", "seconds": seconds}


def watched_row(host: _hosts.Host, size: int, flow_every: int | None, steps: int = 4) -> dict:
    """The worst that ``watch`` says of a stock model in the first steps under the optimizer of its label."""
    torch.manual_seed(0)
    model, start = host.make(10, size).train(), time.perf_counter()
    data = _hosts.batch(host, SAMPLES, 10, size)
    optimizer = torch.optim.AdamW(model.parameters(), host.rate)
    said = []
    with ss.watch(model, optimizer, flow_every=flow_every) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            _hosts.value_of(host, model, data).backward()
            optimizer.step()
            said.append(monitor.verdict)
    worst = next((v for v in said if v.state not in {"healthy", "unknown"}), said[-1])
    return {
        "what": "host", "name": host.name, "size": size, "classes": 10, "seed": flow_every or 0,
        "state": worst.state, "cause": "", "where": worst.where or "", "reason": worst.reason[:160],
        "fall": None if worst.fall_decades is None else round(worst.fall_decades, 2),
        "right": worst.state in {"healthy", "unknown"}, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def fault_row(case: _faults.Case, seed: int = 0) -> dict:
    """The verdict on one broken network, and whether state, cause and place are those an expert would name."""
    states, causes, _ = _faults.TABLE[case.fault]
    model, data, loss = case.build(seed)
    verdict, seconds = _verdict(model, data, loss)
    rights = {
        "state_right": verdict["state"] in states, "cause_right": verdict["cause"] in causes,
        "place_right": case.place in (verdict["where"] or ""),
    }  # fmt: skip
    row = {"what": "fault", "name": case.name, "fault": case.fault, "host": case.host, "seed": seed}
    return row | verdict | rights | {"right": all(rights.values()), "seconds": seconds}


def _verdict(model: Any, data: Any, loss: Any) -> tuple[dict, float]:
    start = time.perf_counter()
    try:
        v = ss.gradient_flow(model, data, loss).verdict
        fall = v.fall_decades
        found = {
            "state": v.state, "cause": v.cause, "where": v.where, "reason": v.reason[:160],
            "fall": None if fall is None or not math.isfinite(fall) else round(fall, 2),
        }  # fmt: skip
    except Exception as error:  # a refusal is a result, too
        found = {"state": f"{type(error).__name__}", "cause": "", "where": "", "reason": str(error)[:160], "fall": None}  # fmt: skip
    return found, round(time.perf_counter() - start, 1)


def work(part: str) -> Iterator[tuple[tuple, Any]]:
    """Keys and what measures them, the cheap ones first."""
    held = _hosts.held_out()
    hosts = sorted(_hosts.hosts(), key=lambda h: h.kind.startswith("image"))
    draw = random.Random(SEED)
    if part in {"held-out", "seen"}:
        for host in hosts:
            if (host.name in held) == (part == "held-out"):
                yield _host_job(part, host, host.native, 10, 0)
        for case in _faults.cases():
            if _faults.split(case.host) == part.replace("-", " "):
                yield _fault_job(part, case, 0)
    elif part == "sizes":
        for host, size, classes in _sizes(hosts):
            yield _host_job(part, host, size, classes, 0)
    elif part == "watched":
        for host in hosts:
            # Five halvings leave nothing of the smallest images.
            size = host.native if host.name in SHRINKING else host.small
            for flow_every in (None, 1):
                key = (part, host.name, size, 10, flow_every or 0)
                yield key, lambda host=host, size=size, flow=flow_every: watched_row(host, size, flow)
    elif part == "flips":
        # Mostly those that take no images: ten seeds of them are a minute's work.
        chosen = draw.sample([h for h in hosts if not h.kind.startswith("image")], 20)
        chosen += draw.sample([h for h in hosts if h.kind.startswith("image")], 10)
        light = [c for c in _faults.cases() if not c.host.startswith(("timm", "torchvision"))]
        broken = draw.sample(light, 30)
        for seed in range(SEEDS):
            for host in chosen:
                yield _host_job(part, host, host.small, 10, seed)
            for case in broken:
                yield _fault_job(part, case, seed)


def _sizes(hosts: list[_hosts.Host]) -> list[tuple[_hosts.Host, int, int]]:
    """Every host at every size with every number of classes, the cheap ones first."""
    rows = json.loads(ROWS.read_text())["rows"] if ROWS.exists() else []
    known = {r["name"]: r["seconds"] for r in rows if r["what"] == "host"}
    options = [
        (h, size, classes) for h in hosts for size in h.sizes for classes in _hosts.class_counts(h)
        if (size, classes) != (h.native, 10)
    ]  # fmt: skip
    # What differs from the native run in one thing alone comes before what differs in both.
    both = lambda o: o[1] != o[0].native and o[2] not in (2, 10)  # noqa: E731
    return sorted(options, key=lambda o: (both(o), known.get(o[0].name, 10.0) * (o[1] / o[0].native) ** 2))


def _host_job(part: str, host: _hosts.Host, size: int, classes: int, seed: int) -> tuple[tuple, Any]:
    return (part, host.name, size, classes, seed), lambda: host_row(host, size, classes, seed)


def _fault_job(part: str, case: _faults.Case, seed: int) -> tuple[tuple, Any]:
    return (part, case.name, None, None, seed), lambda: fault_row(case, seed)


def figures() -> list[dict]:
    """What the kept rows come to."""
    rows = json.loads(ROWS.read_text())["rows"]
    found = []
    for part in dict.fromkeys(r["part"] for r in rows):
        for what, aim in (("host", "1"), ("fault", ">= 0.95")):
            mine = [r for r in rows if r["part"] == part and r["what"] == what]
            if mine:
                wrong = [f"{r['name']} ({r['state']}, {r['cause']})" for r in mine if not r["right"]]
                found.append({
                    "name": f"{what}s {'healthy' if what == 'host' else 'state, cause and place right'}, {part}",
                    "value": sum(r["right"] for r in mine) / len(mine), "unit": f"of {len(mine)}", "aim": aim,
                    "detail": "; ".join(wrong),
                })  # fmt: skip
    return found + _flips([r for r in rows if r["part"] == "flips"])


def _flips(rows: list[dict]) -> list[dict]:
    """How many seeds give another state than most seeds of the same network."""
    states: dict[str, list[str]] = {}
    for row in rows:
        states.setdefault(row["name"], []).append(row["state"])
    flipped = {name: len(s) - Counter(s).most_common(1)[0][1] for name, s in states.items()}
    if not rows:
        return []
    return [{
        "name": f"seeds whose state differs from most of the {len(states)} networks' seeds",
        "value": sum(flipped.values()) / len(rows), "unit": f"of {len(rows)}", "aim": "< 0.02",
        "detail": "; ".join(f"{name}: {n}" for name, n in flipped.items() if n),
    }]  # fmt: skip


def main() -> None:
    """Measure what is missing, for so many seconds; exit with 3 where something is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("part", choices=["held-out", "seen", "sizes", "flips", "watched"])
    parser.add_argument("--seconds", type=float, default=math.inf)
    chosen = parser.parse_args()
    rows = json.loads(chosen.file.read_text())["rows"] if chosen.file.exists() else []
    done = {(r["part"], r["name"], r.get("size"), r.get("classes"), r["seed"]) for r in rows}
    start = time.perf_counter()
    for key, measure in work(chosen.part):
        if key in done:
            continue
        if time.perf_counter() - start > chosen.seconds:
            raise SystemExit(3)
        rows.append({"part": chosen.part} | measure())
        print({k: rows[-1][k] for k in ("name", "state", "cause", "right", "seconds")}, flush=True)
        head = json.dumps({"torch": torch.__version__, "held_out": _hosts.fingerprint()})
        lines = ",\n".join(json.dumps(row) for row in rows)
        chosen.file.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
