"""Put each fault of `mutations.toml` into a copy of the source, and see whether `meshpeft verify` or a test notices.

    python scripts/mutations.py --check            # every text that is replaced is there, once
    python scripts/mutations.py                    # run what is not known yet, and write the table
    python scripts/mutations.py --only 'norm of*'  # some of them, by name

A mutation is run against `verify` with the options that the list names, and against its package's tests with `-x`. Each
is a process that is forked from this one, so that torch is imported once. What was found is kept in `mutations.json`,
with checksums of what it depends on: the mutation, the mutated file, and verify's own code or the tests. So a second
run does only what has changed. The table is written into docs/verification.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST, RESULTS = ROOT / "scripts" / "mutations.toml", ROOT / "scripts" / "mutations.json"
PAGE = ROOT / "docs" / "verification.md"
SOURCE = Path("src/meshpeft")
KINDS = (
    "states",
    "gradient sums",
    "norm",
    "init",
    "masks",
    "slices",
    "quantisation scales",
    "export order",
    "data and loss",
    "context parallel",
    "transformers",
    "sharded base",
    "resume",
)
_BEGIN, _END = "<!-- the table of mutations: scripts/mutations.py writes it -->", "<!-- end of the table -->"
# Imported before the forks; whatever takes long and is not ours.
_HEAVY = (
    "bitsandbytes.functional",
    "numpy",
    "pytest",
    "rich",
    "safetensors.torch",
    "spmd_types",
    "torch.distributed.checkpoint",
    "torch.testing._internal.distributed.fake_pg",
    "transformers.models.auto.modeling_auto",
    "tyro",
)


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        name: what it does, as a sentence.
        kind: one of `KINDS`.
        file: below src/meshpeft.
        old, new: the text that is replaced, found exactly once, and what takes its place.
        verify: name of the set of options that `verify` is run with.
        tests: files below tests/, the likeliest to notice first; or single tests.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    verify: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What noticed a mutation; empty where nothing did. The keys are checksums of what that depends on."""

    verify_key: str = ""
    verify: str = "not run"
    test_key: str = ""
    test: str = "not run"


def read_list() -> tuple[list[Mutation], dict[str, str]]:
    """The mutations, and the sets of options for `verify`."""
    content = tomllib.loads(LIST.read_text(encoding="utf-8"))
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in content["mutation"]]
    return mutations, content["options"]


def read_results() -> dict[str, Found]:
    """What earlier runs found, by the mutation's name."""
    if not RESULTS.exists():
        return {}
    return {name: Found(**found) for name, found in json.loads(RESULTS.read_text(encoding="utf-8")).items()}


def problems(mutations: list[Mutation], options: dict[str, str]) -> list[str]:
    """What in the list is out of date."""
    found = []
    for mutation in mutations:
        path = ROOT / SOURCE / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.exists() else 0
        if count != 1:
            found.append(f"{mutation.name}: its text is {count} times in {mutation.file}, expected once")
        if mutation.kind not in KINDS:
            found.append(f"{mutation.name}: no kind {mutation.kind!r}; the kinds are {', '.join(KINDS)}")
        if mutation.verify not in options:
            found.append(f"{mutation.name}: no set of options {mutation.verify!r}")
        found += [
            f"{mutation.name}: there is no {test}"
            for test in mutation.tests
            if not (ROOT / "tests" / test.partition("::")[0]).exists()
        ]
    names = [mutation.name for mutation in mutations]
    found += [f"{name}: twice in the list" for name in sorted({name for name in names if names.count(name) > 1})]
    return found


def verify_key(mutation: Mutation, options: dict[str, str]) -> str:
    """A checksum of what decides whether `verify` notices a mutation."""
    given = [mutation.file, mutation.old, mutation.new, options[mutation.verify]]
    return _checksum(given, [ROOT / SOURCE / mutation.file, *sorted((ROOT / SOURCE / "verify").glob("*.py"))])


def test_key(mutation: Mutation) -> str:
    """A checksum of what decides whether a test notices a mutation."""
    given = [mutation.file, mutation.old, mutation.new, *mutation.tests]
    files = [ROOT / "tests" / test.partition("::")[0] for test in mutation.tests]
    return _checksum(given, [ROOT / SOURCE / mutation.file, *files])


def _checksum(given: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps(given).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def mutated_copy(mutation: Mutation, directory: Path) -> Path:
    """A copy of the project with the mutation in it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src", "tests", "pyproject.toml"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name, follow_symlinks=False)  # a link may lead to a directory
    path = directory / SOURCE / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    return directory


def run_forked(work: Callable[[], int], tree: Path, limit: float) -> tuple[int | None, str]:
    """Call `work` in a process of its own that imports meshpeft from `tree`; its exit code and what it printed.

    The code is `None` where it took longer than `limit` seconds.
    """
    log = tree / "printed"
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            os.setsid()
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(tree)
            os.environ["PYTHONPATH"] = str(tree / "src")
            sys.path[:0] = [str(tree / "src")]
            sys.dont_write_bytecode = True
            try:
                code = work()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, log.read_text(errors="replace")
        time.sleep(0.1)


def verify(options: str, tree: Path, limit: float) -> str:
    """How `verify` notices the mutation in a tree; empty where it does not."""

    def work() -> int:
        main = importlib.import_module("meshpeft.cli.main").main
        return int(main(["verify", *shlex.split(options)]))

    code, printed = run_forked(work, tree, limit)
    if code == 0:
        return ""
    if code is None:
        return f"no end within {limit:.0f} s"
    wrong = re.findall(r"^  ([a-z][a-z -]*?) +\S+ +<- wrong", printed, re.MULTILINE)
    if wrong:
        return ", ".join(wrong)
    said = re.search(r"^(?:\[rank\d+\]: ?)*meshpeft verify: (?!warning)(.+)", printed, re.MULTILINE)
    lines = [line for line in printed.splitlines() if line.strip()]
    return _short(said[1] if said else re.sub(r"^(\[rank\d+\]: ?)+", "", lines[-1]) if lines else f"exit code {code}")


def tests(names: tuple[str, ...], tree: Path, limit: float) -> str:
    """The first test that notices the mutation in a tree; empty where none does."""

    def work() -> int:
        pytest = importlib.import_module("pytest")
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        # One after the other: given together, a file and one of its tests are run in the file's order.
        return next(filter(None, (int(pytest.main([f"tests/{name}", *options])) for name in names)), 0)

    code, printed = run_forked(work, tree, limit)
    if code == 0:
        return ""
    if code is None:
        return f"no end within {limit:.0f} s"
    first = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[.*)?(?: - .*)?$", printed, re.MULTILINE)
    return first[1] if first else f"exit code {code}"


def _short(text: str) -> str:
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", " ".join(text.split()))
    return text if len(text) <= 90 else text[:89] + "…"


def noticed(how: str) -> bool:
    """Whether a cell of the table means that the mutation was seen."""
    return bool(how) and how != "not run" and not how.startswith("no end within")


def table(mutations: list[Mutation], results: dict[str, Found]) -> str:
    """The table in Markdown, kind after kind."""
    lines = ["| kind | mutation | seen by `verify` in | seen by the test |", "|---|---|---|---|"]
    for kind in KINDS:
        for mutation in mutations:
            if mutation.kind == kind:
                found = results.get(mutation.name, Found())
                cells = (kind, mutation.name, found.verify or "–", f"`{found.test}`" if found.test else "–")
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def write_table(mutations: list[Mutation], results: dict[str, Found]) -> None:
    """Put the table into the page, between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    PAGE.write_text(f"{before}{_BEGIN}\n{table(mutations, results)}\n{_END}{after}", encoding="utf-8")


def _prepare_models(options: dict[str, str], directory: Path) -> dict[str, str]:
    """The options with `{family}` filled in: the directory of a tiny model of that family."""
    families = sorted({family for text in options.values() for family in re.findall(r"\{(\w+)\}", text)})

    def work() -> int:
        sys.path[:0] = [str(ROOT / "tests")]
        save_tiny = importlib.import_module("helpers.tiny_models").save_tiny
        for family in families:
            save_tiny(family, directory / family)
        return 0

    (directory / "src").symlink_to(ROOT / "src")
    code, printed = run_forked(work, directory, 300)
    if code != 0:
        raise SystemExit(f"no tiny models: {printed}")
    return {name: text.format(**{family: directory / family for family in families}) for name, text in options.items()}


def run(mutations: list[Mutation], options: dict[str, str], limit: float) -> None:
    """Run the mutations that have no result of the present sources, and keep what was found."""
    results = read_results()
    waiting = [
        (mutation, known.verify_key != verify_key(mutation, options), known.test_key != test_key(mutation))
        for mutation in mutations
        for known in [results.get(mutation.name, Found())]
    ]
    waiting = [each for each in waiting if any(each[1:])]
    print(f"{len(waiting)} of {len(mutations)} mutations to run", flush=True)
    if not waiting:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for module in _HEAVY:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as models:
        filled = _prepare_models(options, Path(models))
        for number, (mutation, ask_verify, ask_tests) in enumerate(waiting, 1):
            begun, found = time.monotonic(), read_results().get(mutation.name, Found())
            keys = verify_key(mutation, options), test_key(mutation)
            with tempfile.TemporaryDirectory() as name:
                tree = mutated_copy(mutation, Path(name))
                if ask_verify:
                    how = verify(filled[mutation.verify], tree, limit)
                    found = replace(found, verify=how, verify_key=keys[0])
                if ask_tests:
                    how = tests(mutation.tests, tree, limit)
                    found = replace(found, test=how, test_key=keys[1])
            content = {**read_results(), mutation.name: found}
            plain = {name: asdict(content[name]) for name in sorted(content)}
            RESULTS.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            seconds = f"{time.monotonic() - begun:.0f} s"
            how = f"verify: {found.verify or '-'}; test: {found.test or '-'}"
            print(f"{number:>3}  {mutation.name}: {how} ({seconds})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only look whether the list fits the sources")
    parser.add_argument("--only", default="*", help="names of mutations, with *")
    parser.add_argument("--kind", nargs="+", default=["*"], help="their kinds, with *")
    parser.add_argument("--limit", type=float, default=300, help="seconds for verify, and for the tests")
    given = parser.parse_args()
    everything, options = read_list()
    wrong = problems(everything, options)
    if wrong:
        print("\n".join(["the list is out of date:", *wrong]))
        return 1
    if given.check:
        print(f"{len(everything)} mutations fit the sources")
        return 0
    chosen = [
        mutation
        for mutation in everything
        if fnmatch.fnmatch(mutation.name, given.only)
        and any(fnmatch.fnmatch(mutation.kind, kind) for kind in given.kind)
    ]
    run(chosen, options, given.limit)
    results = {name: found for name, found in read_results().items() if name in {m.name for m in everything}}
    write_table(everything, results)
    unseen = [
        mutation.name
        for mutation in chosen
        if not (noticed(results[mutation.name].verify) or noticed(results[mutation.name].test))
    ]
    if unseen:
        print("\n".join(["seen by neither:", *unseen]))
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
