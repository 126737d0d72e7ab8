"""Everything to learn about the kernels in ten minutes of a GPU: ``python -m benchmarks.gpu.session --output DIR``.

Steps run in order, each within its seconds: what no longer fits is left out and named. The file gpu_session.json is
rewritten after every step and the records of a step after every shape, so a run that is killed loses one shape. Clocks,
power and temperature are read before and after every step. ``--rehearse`` runs the same steps at tiny sizes without a
GPU (on interpreted kernels with TRITON_INTERPRET=1), to find mistakes before a GPU is there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import session_steps as steps
from benchmarks.gpu.attention import Bench, free
from benchmarks.gpu.formulations import UnavailableError
from benchmarks.gpu.records import Machine, machine_at_hand, provenance
from benchmarks.gpu.session_steps import REAL, TINY, Session
from benchmarks.measuring.gpu_timing import reason
from benchmarks.measuring.provenance import ROOT, clocks, slug, versions
from mixkernels.roofline import Peaks


class Part(NamedTuple):
    """A step of the session."""

    name: str
    seconds: float
    run: Callable[[Session], dict[str, Any]]


PARTS = (
    Part("machine", 15, steps.machine),
    Part("compile", 40, steps.compile_ahead),
    Part("checks", 35, steps.checks),
    Part("forward", 45, steps.forward),
    Part("backward", 50, steps.backward),
    Part("host", 20, steps.host_times),
    Part("rivals", 130, steps.rivals),
    Part("layer", 50, steps.layer),
    Part("counters", 45, steps.counters),
    Part("ranking", 50, steps.ranking),
    Part("tests", 85, steps.tests),
)
"""In order of importance, as what comes last may have no time left; together 565 seconds."""


def run_parts(session: Session, parts: Sequence[Part] = PARTS) -> bool:
    """Run the steps; return whether all checks and tests that ran passed."""
    fine = True
    for part in parts:
        begin = time.monotonic()
        session.bench.deadline = min(begin + part.seconds, session.deadline)
        entry: dict[str, Any] = {"name": part.name, "clocks_before": clocks()}
        if session.deadline - begin < min(3.0, part.seconds):
            entry |= {"status": "left out", "reason": "the session's time was over"}
        else:
            try:
                entry |= {"status": "done", "result": part.run(session)}
            except UnavailableError as why:
                entry |= {"status": "unavailable", "reason": str(why)}
            except Exception as error:
                entry |= {"status": "failed", "reason": reason(error)}
        free()
        entry |= {"seconds": round(time.monotonic() - begin, 2), "clocks_after": clocks()}
        session.steps.append(entry)
        session.save(complete=False)
        print(json.dumps({name: entry.get(name) for name in ("name", "status", "reason", "seconds")}), flush=True)
        result = entry.get("result", {})
        fine = fine and entry["status"] != "failed" and not result.get("failed") and result.get("passed", True)
    session.save(complete=True)
    return fine


def rehearsal(folder: Path, arguments: Sequence[str]) -> Session:
    """Return a session at tiny sizes on the CPU."""
    from mixkernels.triton_common.support import interpreting

    peaks = Peaks(1e12, 1e11, 1e11)
    described = Machine(
        torch.device("cpu"),
        "rehearsal on a CPU",
        lambda dtype: (peaks, "made up"),
        peaks,
        versions(),
        "rehearsal",
        provenance(arguments),
    )
    bench = Bench(described, "triton" if interpreting() else "torch", folder, seconds=0.0, largest_spread=float("inf"))
    return Session(bench, TINY, False, float("inf"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if a check, a test or a step failed, 2 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.session", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where files go")
    parser.add_argument("--seconds", type=float, default=570.0, help="time limit of the session")
    parser.add_argument("--commit", help="the commit, if the checkout has no repository")
    parser.add_argument(
        "--only", action="append", choices=[part.name for part in PARTS], help="a step; may be repeated"
    )
    parser.add_argument("--rehearse", action="store_true", help="run all steps at tiny sizes without a GPU")
    parser.add_argument("--one-pass", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    begin = time.monotonic()
    if options.rehearse:
        session = rehearsal(options.output or ROOT / "rehearsal", arguments)
    else:
        if not torch.cuda.is_available():
            print(
                "python -m benchmarks.gpu.session needs a GPU (--rehearse does not): none is visible", file=sys.stderr
            )
            return 2
        if options.one_pass:
            steps.one_pass(REAL)
            return 0
        described = machine_at_hand(arguments, options.commit)
        folder = options.output or ROOT / "benchmarks" / "results" / slug(described.name)
        session = Session(Bench(described, "triton", folder), REAL, True, begin + options.seconds)
    session.bench.folder.mkdir(parents=True, exist_ok=True)
    return int(not run_parts(session, parts))


if __name__ == "__main__":
    sys.exit(main())
