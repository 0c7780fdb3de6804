"""The tree is the architecture: imports point down, files stay small, nothing is caught broadly but at the edges."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvchat

PACKAGE = Path(kvchat.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = [
    *("errors", "memory", "locks", "hangup", "terminal", "events", "sections", "config", "transcript", "files"),
    *("fingerprint", "values", "meanings", "config_file", "builtin", "documents", "cipher", "keys"),
    *("cache", "codecs", "attention", "compress"),
    *("template", "supported", "convert", "download", "model", "learned", "anatomy", "sampling"),
    *("fused", "step", "cap", "engine"),
    *("utility", "bandwidths", "store", "episodes", "portable", "recode", "pool", "residence"),
    *("planning", "footprint"),
    *(
        "stats",
        "branching",
        "drafting",
        "course",
        "unfinished",
        "session",
        "inspecting",
        "attaching",
        "probe",
        "foreseeing",
        "titling",
    ),
    *("jobs", "balance", "calling", "handle", "asynchronous", "engines", "shelf", "worker", "opening"),
    *("evals", "fitting", "figures", "segment_cells", "segment_map", "segment_page", "transcript_page", "tui", "bench"),
    *("cli", "__main__"),
]
"""A part may import only from parts before it."""

EDGES = {"cli/app.py", "jobs.py", "tui/jobs.py"}
"""The process edges, which report whatever is raised."""

CLEANUPS = {
    *("cli/app.py", "cli/take_in.py", "store/migrations.py", "opening.py", "supported.py", "worker.py"),
    *("tui/session_screen.py", "tui/turns.py"),
}
"""Where everything is caught to be cleaned up after or named, and raised again."""


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[str]:
    """The parts that a file imports when it runs, inside functions too."""
    tree = ast.parse(file.read_text("utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvchat":
            names = [node.module] if "." in node.module else [f"kvchat.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("kvchat.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    if part != "__init__":
        upward = [name for name in imports(file) if name != part and ORDER.index(name) > ORDER.index(part)]
        assert upward == []


def test_every_part_has_its_place() -> None:
    assert {part_of(file) for file in FILES} == {"__init__", *ORDER}


def test_tiers_and_scorers_and_front_ends_keep_to_their_contracts() -> None:
    reached = {part: {name for file in FILES if part_of(file) == part for name in imports(file)} for part in ORDER}
    for name in ("tiers", "loading", "excerpts", "room"):  # they are given what fetches
        assert "store.store" not in (PACKAGE / "residence" / f"{name}.py").read_text("utf-8")
    assert "engine" not in reached["compress"]
    words = {"figures", "segment_map", "segment_cells", "documents"}  # of plain figures, without the engine
    words |= {
        "transcript",
        "transcript_page",
        "files",
        "config_file",
        "values",
        "meanings",
    }  # what is written for the user
    words |= {"builtin", "download"}  # in a thread
    words |= {"hangup"}  # when the terminal goes away
    assert reached["tui"] <= {"tui", "terminal", "events", "config", "errors", "worker"} | words
    assert reached["segment_map"] <= {"figures", "terminal", "segment_cells"}


LONGER = {"store.py": 370, "residence.py": 370}
"""store: one class over one set of tables, whose rules would else stand in two places. residence: what happens to KV
is read from top to bottom in one place."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_small_and_say_what_they_are(file: Path) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= LONGER.get(file.name, 300)
    assert ast.get_docstring(ast.parse(text))


def test_only_process_edges_catch_everything() -> None:
    broad = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            ):
                raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))
                name = str(file.relative_to(PACKAGE))
                assert name in (CLEANUPS if raises else EDGES), f"{name}:{node.lineno}"
                broad[name] = True
    assert broad.keys() >= {"cli/app.py", "jobs.py"}


def test_nothing_is_pickled_and_no_remote_code_is_run() -> None:
    for file in FILES:
        text = file.read_text("utf-8")
        assert "pickle" not in text
        assert "torch.load" not in text
        assert "trust_remote_code=True" not in text


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(kvchat, name) is not None for name in kvchat.__all__)
