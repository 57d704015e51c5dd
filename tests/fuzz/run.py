"""Feed damaged files to every parser: it must read or refuse each by the project's own error, soon, in little memory.

    python tests/fuzz/run.py --minutes 15 --seed 0
    python tests/fuzz/run.py --count 2000 --targets splat.spz image
    python tests/fuzz/run.py --minutes 5 --engine atheris --targets splat.glb     # pip install atheris

A crash is an error that the target does not announce (`targets.py`), one whose message has several lines, a process
that ends, more than `SECONDS_PER_INPUT`, more address space than the target may have, or, where the input must stand
alone, a file opened outside its folder. Inputs that crash are kept in `--keep`, to become a regression test.

Inputs are mutations of valid files that `targets.py` makes (`mutations.py`). Atheris instruments the project's Python
code instead and keeps inputs that reach new lines of it; it damages the first file of a target alone. Each target has a
process of its own and an equal share of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
SECONDS_PER_INPUT = 10
PACKAGES = ("diff2to3", "gs_render", "sparse_vae", "_gs_render_reading")
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "reliability.md"


@dataclass
class Outcome:
    """What became of a target's inputs."""

    target: str
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    grown: int = 0  # MiB of resident memory above that of valid inputs
    peak: int = 0  # MiB of resident memory, with PyTorch itself
    crashes: dict[str, str] = field(default_factory=dict)  # where and what -> description of the first
    crashed: int = 0

    @property
    def tried(self) -> int:
        return self.read + self.refused + self.crashed


class Case:
    """A valid input in a folder of its own, one file of which is damaged at a time."""

    def __init__(self, make: Callable[[Path], list[Path]], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.files = folder, make(folder)
        self.whole = {path: path.read_bytes() for path in self.files}

    def restore(self) -> None:
        """Puts the valid files back; a reader may have touched any of them."""
        for path, content in self.whole.items():
            path.write_bytes(content)


class Fuzzer:
    """One target's cases and what came of them.

    Args:
        target: a `Target`.
        folder: empty, for the cases.
        keep: folder for inputs that crash; None keeps none.
    """

    def __init__(self, target: Any, folder: Path, keep: Path | None = None) -> None:
        self.target, self.keep, self.outcome = target, keep, Outcome(target.name)
        self.opened: list[Any] = []
        self.cases = [Case(make, folder.resolve() / str(number) / "case") for number, make in enumerate(target.make)]
        for case in self.cases:  # also imports all that reading needs
            with contextlib.suppress(*target.refuses):
                target.read(case.files[0])
            case.restore()
        self.before = _resident()
        if target.alone:
            sys.addaudithook(lambda event, a: self.opened.append(a[:2]) if event == "open" else None)

    def attempt(self, case: Case, victim: Path, data: bytes) -> None:
        """Reads a case with one file replaced."""
        victim.write_bytes(data)
        self.opened.clear()
        start = time.perf_counter()
        try:
            with _alarm(SECONDS_PER_INPUT):
                self.target.read(case.files[0])
            self.outcome.read += 1
        except self.target.refuses as error:
            if "\n" in str(error).strip():
                self._crash("several lines", error, victim, data)
            else:
                self.outcome.refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._crash(_place(error), error, victim, data)
        self.outcome.slowest = max(self.outcome.slowest, time.perf_counter() - start)
        if self.target.alone and (outside := self._outside(case)):
            self._crash("opened", PermissionError(f"opened {outside[0]}"), victim, data)
        case.restore()

    def run(self, count: int | None, seconds: float | None, seed: int) -> Outcome:
        """Damages and reads so many inputs, or for so long."""
        from mutations import mutate, mutate_inside

        dice, start, number = random.Random(f"{seed} {self.target.name}"), time.perf_counter(), 0
        while (count is None or number < count) and (seconds is None or time.perf_counter() - start < seconds):
            case = dice.choice(self.cases)
            victim = dice.choice([*case.files, *[case.files[0]] * 2])
            whole = case.whole[victim]
            data = mutate(whole, dice) if dice.random() < 0.4 else mutate_inside(victim.name, whole, dice)
            self.attempt(case, victim, data)
            number += 1
        return self.finish(time.perf_counter() - start)

    def finish(self, seconds: float) -> Outcome:
        """The outcome with its totals."""
        self.outcome.seconds, self.outcome.peak = seconds, _resident()
        self.outcome.grown = self.outcome.peak - self.before
        return self.outcome

    def _outside(self, case: Case) -> list[str]:
        own = (str(case.folder), sys.prefix, sys.base_prefix)
        read = [os.fsdecode(path) for path, mode in self.opened if "r" in str(mode) and isinstance(path, str | bytes)]
        return [path for path in read if not os.path.realpath(path).startswith(own)]

    def _crash(self, place: str, error: BaseException, victim: Path, data: bytes) -> None:
        self.outcome.crashed += 1
        key = f"{type(error).__name__} at {place}"
        if key in self.outcome.crashes:
            return
        self.outcome.crashes[key] = f"{victim.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            number = len(self.outcome.crashes)
            (self.keep / f"{self.target.name}-{number}-{victim.name}").write_bytes(data)


def _place(error: BaseException) -> str:
    """The innermost line of the project that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(f"/{name}" in frame.filename for name in PACKAGES)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(gigabytes: float) -> None:
    """No more address space than now and so much more: what asks for it gets an error, a crash."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = now + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def fuzz(target: Any, options: argparse.Namespace, seconds: float | None) -> Outcome:
    """Fuzzes a target in a process of its own, a fork: what is imported already costs it nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cases"

        def work() -> None:
            warnings.simplefilter("ignore")  # of Pillow and numpy on damaged data; errors are what counts
            fuzzer = Fuzzer(target, folder, options.keep)
            limit_memory(target.gigabytes)
            sender.send(fuzzer.run(options.count, seconds, options.seed))

        process = context.Process(target=work)
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:  # it ended before it could tell
            process.join()
            shutil.copytree(folder, options.keep / f"{target.name}-ended", dirs_exist_ok=True, symlinks=True)
            reason = "its last input is kept"
            return Outcome(target.name, crashed=1, crashes={f"process ended with {process.exitcode}": reason})
        finally:
            process.join()


def fuzz_by_coverage(name: str, options: argparse.Namespace) -> None:
    """Fuzzes a target's first file with atheris in this process, and ends it."""
    import atheris

    with atheris.instrument_imports(include=list(PACKAGES)):
        from targets import TARGETS
    target, folder, start = TARGETS[name], Path(tempfile.mkdtemp()), time.perf_counter()
    fuzzer, corpus = Fuzzer(target, folder / "cases", options.keep), folder / "corpus"
    limit_memory(target.gigabytes)
    corpus.mkdir()
    for number, case in enumerate(fuzzer.cases):
        (corpus / str(number)).write_bytes(case.whole[case.files[0]])

    def attempt(data: bytes) -> None:
        fuzzer.attempt(fuzzer.cases[0], fuzzer.cases[0].files[0], data)
        seconds = time.perf_counter() - start
        if seconds > 60 * (options.minutes or 1e9) or fuzzer.outcome.tried == options.count:
            print(table([fuzzer.finish(seconds)], _command(), _versions()), flush=True)
            shutil.rmtree(folder)
            os._exit(1 if fuzzer.outcome.crashes else 0)

    length = 2 * max(len(case.whole[case.files[0]]) for case in fuzzer.cases)
    arguments = [f"-seed={options.seed + 1}", f"-max_len={length}", "-rss_limit_mb=0", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], attempt)
    atheris.Fuzz()


def table(outcomes: list[Outcome], command: str, versions: str) -> str:
    """The section of the results file."""
    rows = [
        "| target | inputs | read | refused | crashes | slowest | memory grown | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {o.target} | {o.tried:,} | {o.read:,} | {o.refused:,} | {o.crashed:,} | {o.slowest:.2f} s | {o.grown} MiB |"
        f" {o.peak} MiB |"
        for o in outcomes
    ]
    total, crashed = sum(o.tried for o in outcomes), sum(o.crashed for o in outcomes)
    rows.append(
        f"| all | {total:,} | {sum(o.read for o in outcomes):,} | {sum(o.refused for o in outcomes):,} | {crashed:,} |"
        f" {max(o.slowest for o in outcomes):.2f} s | | {max(o.peak for o in outcomes)} MiB |"
    )
    found = [f"- {o.target}: {where}: {what}" for o in outcomes for where, what in o.crashes.items()]
    return "\n".join([f"`{command}`: {versions}.", "", *rows, "", *found]).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="for all targets together")
    length.add_argument("--count", type=int, help="inputs for each target (500, unless --minutes)")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="some of them; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-crashes"), help="where inputs that crash are kept")
    parser.add_argument("--write", action="store_true", help=f"replace the table in {RESULTS.name}")
    options = parser.parse_args()
    if options.minutes is None and options.count is None:
        options.count = 500
    if options.engine == "atheris":
        if len(options.targets or ()) != 1:
            parser.error("--engine atheris fuzzes one target; name it by --targets")
        fuzz_by_coverage(options.targets[0], options)
    import torch
    from targets import TARGETS

    torch.set_num_threads(1)
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; expected {', '.join(TARGETS)}")
    seconds = None if options.minutes is None else options.minutes * 60 / len(names)
    outcomes = []
    for number, name in enumerate(names):
        print(f"{number + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
        outcomes.append(fuzz(TARGETS[name], options, seconds))
        for where, what in outcomes[-1].crashes.items():
            print(f"CRASH {name}: {where}: {what}", file=sys.stderr, flush=True)
    text = table(outcomes, _command(), _versions())
    print(text)
    if options.write:
        write_section(text)
    return 1 if any(outcome.crashes for outcome in outcomes) else 0


def _command() -> str:
    return " ".join(["python tests/fuzz/run.py", *(argument for argument in sys.argv[1:] if argument != "--write")])


def _versions() -> str:
    named = ("torch", "numpy", "pillow", "safetensors", "trimesh", "pyyaml")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in named)])


def write_section(text: str) -> None:
    """Replaces what stands between the marks under '## Fuzzing' in the results file."""
    begin, end = "<!-- table of tests/fuzz/run.py -->\n", "<!-- end of the table -->\n"
    before = RESULTS.read_text() if RESULTS.is_file() else "# Reliability\n"
    if begin not in before:
        before = f"{before.rstrip()}\n\n## Fuzzing\n\n{begin}{end}"
    head, _, rest = before.partition(begin)
    RESULTS.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    sys.exit(main())
