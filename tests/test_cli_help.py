"""Every command's help has examples, and each is run: on a fake engine or a small store, in a folder of its own."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvchat.cli.app import EXIT_CODES, main, program
from kvchat.cli.groups import GROUPS
from kvchat.store.store import Store
from tests.fake_worker import FakeWorker
from tests.store_parts import converse

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = program()
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HEAVY = {"bench", "eval", "fit", "tune", "encrypt", "decrypt", "episodes"}
"""These load a model or ask for keys: of them only the arguments are read."""


def commands(group: Any = PROGRAM, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Names and commands, those of groups too."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def examples(command: Any) -> list[str]:
    return re.findall(r"^  (.*kvchat.*)$", (command.epilog or "").partition("Exit codes")[0], re.MULTILINE)


COMMANDS = dict(commands())
EXAMPLES = [(name, line) for name, command in (("", PROGRAM), *COMMANDS.items()) for line in examples(command)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file that examples name, and a store with the session "trip"."""
    monkeypatch.chdir(tmp_path)
    for name in ("chat.json", "other.json", "locomo.json"):
        (tmp_path / name).write_text(json.dumps(CHAT))
    for name in ("notes.txt", "report.md"):
        (tmp_path / name).write_text("Some text.\n")
    for name in ("eval-fidelity.jsonl", "eval-recall.jsonl", "mine.toml"):
        (tmp_path / name).write_text("")
    with closing(Store(tmp_path / "kvchat.db")) as store:
        converse(store, "trip", *(f"Rome {number}" for number in range(6)))
    for name, value in {"KVCHAT_STORE__PATH": "kvchat.db", "XDG_CONFIG_HOME": str(tmp_path), "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(line: str, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run one example as a shell would: `<` and a pipe give it stdin."""
    before, _, after = line.rpartition("|")
    words = shlex.split(after)
    stdin = "+ a line\n" if before else ""
    if "<" in words:
        at = words.index("<")
        stdin = Path(words[at + 1]).read_text()
        words = words[:at]
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert words[0] == "kvchat"
    return main(words[1:], worker)


def test_every_command_has_an_example() -> None:
    assert [name for name, command in COMMANDS.items() if not examples(command)] == []
    assert all(f"kvchat {name}" in line for name, line in EXAMPLES if name)


@pytest.mark.parametrize("line", [line for name, line in EXAMPLES if name.split(" ")[0] not in HEAVY])
def test_an_example_does_what_it_says(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"chat.json", "trip.json", "trip.html"} if "export" in line else set()
    if "trip.kvchat" in line and "import" in line:
        assert run("kvchat export trip --format kvchat --output trip.kvchat", FakeWorker(), monkeypatch) == 0
        assert run("kvchat rename trip before", FakeWorker(), monkeypatch) == 0
    code = run(line, FakeWorker(), monkeypatch)
    needs_yes = line == "kvchat rm trip"
    assert code == (1 if needs_yes or (line.startswith("kvchat doctor") and code) else 0)
    assert {file.name for file in folder.iterdir()} >= {name for name in made if name in line}


@pytest.mark.parametrize("line", [line for name, line in EXAMPLES if name.split(" ")[0] in HEAVY])
def test_an_example_is_a_command_line_that_its_command_takes(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line)[1:]
    command: Any = PROGRAM
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context("kvchat", list(words))
    assert bool(words) == any(context.params.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_and_each_option_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(" "), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: kvchat {name}") and "Examples:" in out and "\x1b" not in out
    silent = [option.opts for option in COMMANDS[name].params if not getattr(option, "help", None)]
    assert silent == []


def test_short_help_is_whole_and_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "..." not in out.partition("Talk:")[2].partition("Examples:")[0]
    assert {name for names in GROUPS.values() for name in names} == set(PROGRAM.commands)
    assert "More:" not in out


def test_help_imports_neither_torch_nor_textual() -> None:
    heavy = "{'torch', 'textual', 'rich', 'transformers', 'numpy'} & set(sys.modules)"
    calls = "[c.main(words.split()) for words in ('--help', 'ask --help', 'eval fidelity --help', '--version')]"
    code = f"import sys, kvchat.cli.app as c; {calls}; print(sorted({heavy}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.endswith("\n[]\n")


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("ls", 0),
        ("--version", 0),
        ("show trap", 1),
        ("show trip --turn 99", 1),
        ("ls --set kompress=1", 1),
        ("rm trip", 1),
        ("shwo", 2),
        ("show", 2),
        ("ls --no-such-option", 2),
        ("chat trip --continue", 2),
        ("--continue ask Hi", 2),
        ("show trip --map --turn 1", 2),
        ("ask", 2),
        ("ask trip - Hi -", 2),
    ],
)
def test_exit_codes(words: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split(), FakeWorker()) == code and code in EXIT_CODES
    err = capsys.readouterr().err
    assert (err == "") if code == 0 else (err.startswith("kvchat: ") and err.count("\n") == 1)


def test_an_interrupt_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeWorker, "open", interrupted)
    assert main(["ask", "trip", "Hi"], FakeWorker()) == 130


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{code}  {re.escape(EXIT_CODES[code])}$", out, re.MULTILINE) for code in EXIT_CODES)
    assert set(EXIT_CODES) == {0, 1, 2, 130, 143}


# -- JSON --------------------------------------------------------------------------------------------------------------

NO_JSON = {
    "chat": "a conversation",
    "export": "its --format says what it writes",
    "rename": "prints nothing",
    "rm": "prints nothing",
    "fork": "prints nothing",
}


def test_every_command_that_prints_something_prints_json_too() -> None:
    without = {name for name, command in COMMANDS.items() if not any("--json" in one.opts for one in command.params)}
    assert without == set(NO_JSON)


@pytest.mark.parametrize(
    "words", ["ls", "search Rome", "show trip", "show trip --map", "stats trip", "vacuum", "verify", "models", "config"]
)
def test_json_is_one_value_on_stdout(words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), "--json"], FakeWorker()) == 0
    assert json.loads(capsys.readouterr().out) is not None


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the program offers a shell behind what is typed."""

    def complete(shell: str, typed: str, **more: str) -> str:
        given = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_TYPER_COMPLETE_ARGS": typed}
        for name, value in {**given, "_KVCHAT_COMPLETE": f"complete_{shell}", **more}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main([])
        assert not end.value.code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return complete


@pytest.fixture
def several(folder: Path) -> Path:
    with closing(Store(folder / "kvchat.db")) as store:
        for name in ("trip to Oslo", "tokyo", "rome $HOME"):
            converse(store, name, "Hi")
        store._db.execute("UPDATE sessions SET name = ? WHERE name = 'tokyo'", ["t\x1b[2J"])  # from elsewhere
        store._db.commit()
    return folder


def test_bash_completes_session_names(several: Path, complete: Any) -> None:
    assert sorted(complete("bash", "kvchat show t").split()) == ["Oslo", "to\\", "trip", "trip\\"]
    assert complete("bash", "kvchat ask r") == "rome\\ \\$HOME\n"
    assert "trip" not in complete("bash", "kvchat show t", KVCHAT_STORE__PATH="none.db")
    assert "trip" in complete("bash", "kvchat show --store kvchat.db t")
    assert "trip" in complete("bash", "kvchat --store kvchat.db show t")


def test_zsh_completes_session_names(several: Path, complete: Any) -> None:
    out = complete("zsh", "kvchat export t")
    assert '"trip to Oslo"' in out and '"trip"' in out and "\x1b" not in out
    assert '"export"' in complete("zsh", "kvchat exp")


@pytest.mark.parametrize("name", ["notes.db", "folder", "none.db"])
def test_what_is_no_store_completes_nothing(name: str, folder: Path, complete: Any) -> None:
    (folder / "notes.db").write_text("not a database " * 100)
    (folder / "folder").mkdir()
    assert complete("bash", "kvchat show ", KVCHAT_STORE__PATH=name).strip() == ""
    assert not (folder / "none.db").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_can_be_had(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "_KVCHAT_COMPLETE" in script(shell, monkeypatch, capsys)


def script(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `kvchat --show-completion` prints in that shell."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the name of the shell is given instead
    program.cache_clear()
    with pytest.raises(SystemExit):
        main(["--show-completion", shell])
    program.cache_clear()
    return capsys.readouterr().out


def test_bash_takes_over_what_it_is_offered(
    several: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (several / "kvchat").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvchat "$@"\n')
    (several / "kvchat").chmod(0o755)
    asked = "COMP_WORDS=(kvchat show t); COMP_CWORD=2; _kvchat_completion kvchat t show"
    told = 'printf "%s\\n" "${COMPREPLY[@]}"'
    path = {"PATH": f"{several}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = f"{script('bash', monkeypatch, capsys)}\n{asked}; {told}"
    bash = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env={**os.environ, **path}, cwd=several)
    assert sorted(bash.stdout.splitlines()) == ["trip", "trip\\ to\\ Oslo"], bash.stderr


def test_a_large_module_is_never_needed_to_complete(several: Path) -> None:
    given = {"COMP_WORDS": "kvchat show t", "COMP_CWORD": "2", "_KVCHAT_COMPLETE": "complete_bash"}
    code = (
        "import sys, kvchat.cli.app as c\n"
        "try: c.main([])\n"
        "finally: print(sorted({'torch', 'textual', 'numpy', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given}, cwd=several).stdout
    assert "trip" in out and out.endswith("[]\n")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_do_not_wait_awake_for_long_unless_that_is_asked(given: dict[str, str], found: str) -> None:
    code = "import os; from kvchat.cli.app import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, env=env | given, cwd=ROOT, check=True).stdout
    assert out.split()[-1] == found
