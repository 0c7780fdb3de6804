"""Facts about the command line: what it prints where, its exit codes, and that the prose keeps up with it."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvchat.cli import plain
from kvchat.cli.app import main, program
from kvchat.config import Config
from tests.fake_worker import STATS, USAGE, FakeSession, FakeWorker

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(program().commands)


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def run(worker: FakeWorker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*argv: str, code: int = 0, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert main([argv[0], "--store", str(tmp_path / "none.db"), *argv[1:]], worker) == code
        return capsys.readouterr()

    return run


def test_the_readme_mentions_each_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`kvchat {name}" not in readme] == []


def test_the_readme_mentions_no_command_that_does_not_exist() -> None:
    named = set(re.findall(r"(?:^|[`| ])kvchat ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named - {"is", "saves", "idles"} <= set(COMMANDS)


def test_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "kvchat").glob("*.py") if f" {path.name}" not in readme] == []


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    commands = re.findall(r"^python3 -m venv.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [".[dev]" in command for command in commands] == [False, True]
    assert "grep '^python3 -m venv' \"$root/README.md\"" in (ROOT / ".ci" / "run").read_text()


def test_config_toml_holds_every_setting_with_its_default() -> None:
    defaults = Config().model_dump(mode="json", exclude_none=True)
    given = tomllib.loads((ROOT / "config.toml").read_text())
    assert {name: given[name].keys() for name in given} == {name: defaults[name].keys() for name in defaults}
    assert Config(**given) == Config()


def test_config_toml_explains_every_setting() -> None:
    sections = re.split(r"^\[(\w+)\]$", (ROOT / "config.toml").read_text(), flags=re.MULTILINE)[1:]
    explained = {
        section: re.findall(r"^# .+\n(?:# )?(\w+) = ", body, re.MULTILINE)
        for section, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert explained == {section: list(keys) for section, keys in Config().model_dump().items()}


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--set", "compress.keep=1"], "unknown setting 'compress.keep'; known here: scorer, aggregate, allocate"),
        (["--set", "kompress.keep=1"], "unknown setting 'kompress'; known here: model, store, compress"),
        (["--set", "keep_ratio=1"], "setting 'keep_ratio' needs a section"),
        (["--set", "compress.keep_ratio"], "--set 'compress.keep_ratio' has no '='"),
        (["--set", "compress.keep_ratio=2"], "setting compress.keep_ratio: Input should be less than or equal to 1"),
        (["--set", "compress.rank_chunks=[1"], "--set compress.rank_chunks: '[1' is not a list"),
        (["--config", "none.toml"], "there is no config file none.toml"),
    ],
)
def test_a_wrong_setting_is_one_line(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", *argv]) == 1
    assert capsys.readouterr().err.startswith(f"kvchat: {problem}")


def test_a_usage_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shwo"]) == 2
    assert capsys.readouterr().err == "kvchat: No such command 'shwo'. Did you mean 'show'?\n"
    assert main(["show"]) == 2
    assert re.fullmatch(r"kvchat: .*name.*\n", capsys.readouterr().err, re.IGNORECASE)


def test_an_internal_error_says_so_in_one_line(run: Any, worker: FakeWorker) -> None:
    del worker.heard
    _, err = run("ask", "trip", "Hi", code=1)
    assert err.startswith("kvchat: internal error: AttributeError: ")
    assert err.endswith("(set KVCHAT_DEBUG=1 for the traceback)\n")


def test_ask_streams_the_answer_to_stdout_and_the_rest_to_stderr(run: Any, worker: FakeWorker) -> None:
    out, err = run("ask", "trip", "Hi there")
    assert out == "HI THERE\n"
    assert err.splitlines()[0] == "one segment was rebuilt"
    assert "8 tokens cached, 4 read, 2 written" in err
    assert worker.closed


def test_ask_prints_one_json_object(run: Any) -> None:
    out, _ = run("ask", "trip", "Hi", "--json")
    reply = json.loads(out)
    assert set(reply) == {"text", "usage", "timings", "finish_reason", "session"}
    assert reply["timings"]["seal_s"] == 0.5
    assert (reply["text"], reply["session"], out.count("\n")) == ("HI", "trip", 1)


def test_ask_reads_stdin(run: Any, worker: FakeWorker) -> None:
    run("ask", "trip", "-", stdin="Where?\nWhen?\n")
    assert worker.heard == ["Where?\nWhen?"]


def test_an_empty_message_never_reaches_the_model(run: Any, worker: FakeWorker) -> None:
    assert run("ask", "trip", " \n", code=1)[1] == "kvchat: the message is empty\n"
    assert run("ask", "trip", "a\udcff", code=1)[1].startswith("kvchat: the message is not valid Unicode")
    assert worker.opened == []


def test_the_worker_is_closed_after_an_error(run: Any, worker: FakeWorker) -> None:
    assert run("ask", "trip", "full", code=1)[1].startswith("kvchat: the window has no room")
    assert worker.closed


def test_flags_before_and_after_the_command_both_count(tmp_path: Path, worker: FakeWorker) -> None:
    before = ["--model", "tiny", "--device", "cpu", "--set", "generate.top_k=3", "--rebuild"]
    after = ["--device", "meta", "--set", "generate.seed=5", "--set", "compress.rank_chunks=[0.2, 1.0]"]
    database = tmp_path / "kvchat.db"
    assert main([*before, "ask", "trip", "Hi", "--store", str(database), *after], worker) == 0
    config = worker.config
    assert (config.model.name, config.model.device, config.store_path) == ("tiny", "meta", database)
    assert (config.generate.top_k, config.generate.seed, config.compress.rank_chunks) == (3, 5, (0.2, 1.0))
    assert worker.opened == [("trip", {"model": "tiny", "rebuild": True})]


def test_plain_chat_answers_each_line(run: Any, worker: FakeWorker) -> None:
    lines = "one\n\n/retry\n/rewind\n/fork other\n/tmp/x is a file\n/stats\n/help\n/quit\nnever\n"
    out, err = run("chat", "trip", "--plain", "--system", "Be brief.", stdin=lines)
    assert out == "ONE\nONE\n/TMP/X IS A FILE\n"
    assert worker.heard == ["/tmp/x is a file"]
    assert worker.opened == [("trip", {"model": None, "rebuild": False, "system": "Be brief."})]
    assert "took back: one" in err
    assert "now in other" in err


def test_a_piped_chat_ends_with_the_first_error(run: Any, worker: FakeWorker) -> None:
    assert run("chat", "trip", stdin="/rewind none\nnever\n", code=1)[1].endswith(
        "/rewind takes a number of turns, got 'none'\n"
    )
    assert run("chat", "trip", stdin="/reboot\n", code=1)[1].endswith("unknown command /reboot; /help lists commands\n")
    assert worker.heard == []


def test_chat_without_a_name_opens_the_last_session_and_new_another(run: Any, worker: FakeWorker) -> None:
    for argv in (["chat"], ["chat", "--new"], ["chat", "new", "--new"]):
        run(*argv)
    (last, _), (dated, _), (new, _) = worker.opened
    assert (last, new) == (None, "new")
    assert dated and dated.startswith(time.strftime("%Y-"))


def test_import_takes_the_file_in(run: Any, worker: FakeWorker) -> None:
    _, err = run("import", str(ROOT / "sessions" / "example.json"), "--name", "rome")
    [(name, how)] = worker.opened
    assert name == "rome"
    assert how["system"].startswith("You are")
    assert len(worker.heard) == 8
    assert err == f"rome: 8 messages, {USAGE.prefilled_tokens} tokens\n"


def test_import_names_the_session_after_the_file(run: Any, worker: FakeWorker, tmp_path: Path) -> None:
    (tmp_path / "oslo.md").write_text("## User\n\nHi\n")
    run("import", str(tmp_path / "oslo.md"))
    assert worker.opened[0][0] == "oslo"


def test_a_failed_import_leaves_no_session(run: Any, worker: FakeWorker, tmp_path: Path) -> None:
    (tmp_path / "long.md").write_text("## User\n\nHi\n\n## Assistant\n\nfull\n")
    assert run("import", str(tmp_path / "long.md"), code=1)[1].startswith("kvchat: the window has no room")
    assert worker.deleted == ["long"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"role": "user"', "not JSON: Expecting ',' delimiter at line 1, column 17"),
        ('[{"role": "wizard", "content": "Hi"}]', "message 1: unknown role 'wizard'; known: system, user, assistant"),
        ('[{"role": "user", "content": ""}]', "message 1: the message is empty"),
    ],
)
def test_import_says_where_a_file_is_broken(content: str, problem: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "trip.json"
    path.write_text(content)
    assert run("import", str(path), code=1)[1] == f"kvchat: {path}: {problem}\n"


def test_a_missing_file_is_one_line(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    assert run("import", str(path), code=1)[1] == f"kvchat: {path}: No such file or directory\n"


def test_stats_print_lines_or_json(run: Any) -> None:
    assert "48 of 96 KV pairs held (keep_ratio 0.50), 2.0 kB in memory, 4.1 kB on disk" in run("stats", "trip")[0]
    assert json.loads(run("stats", "trip", "--json")[0]) == STATS


def test_stats_draw_a_map(run: Any) -> None:
    out, _ = run("stats", "trip", "--map")
    assert out.splitlines()[:4] == [
        "trip",
        "tiny · 1 turns · 12 of 100 tokens · 48 of 96 KV pairs held (keep_ratio 0.50)",
        "2.0 kB in memory · 4.1 kB on disk (0.50)",
        "",
    ]
    assert "turn 1 ████" in out and "█ in memory  ░ on disk" in out and "a dogs park (1)" in out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


def test_stats_write_a_page(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    out, err = run("stats", "trip", "--html", str(file))
    text = file.read_text("utf-8")
    assert out == "" and str(file) in err
    assert text.startswith("<!doctype html>") and "dogs park" in text and "<script" not in text
    assert "add --force" in run("stats", "trip", "--html", str(file), code=1)[1]
    assert "turn 1 █" in run("stats", "trip", "--html", str(file), "--force", "--map")[0]


def test_models_and_doctor_print_lines_or_json(run: Any) -> None:
    assert "smollm2-135m" in run("models")[0]
    assert any(model["name"] == "smollm2-135m" for model in json.loads(run("models", "--json")[0]))
    checks = json.loads(run("doctor", "--json")[0])
    assert {check["state"] for check in checks} <= {"ok", "warn", "fail"}
    assert {"python", "torch", "device", "attention", "store", "disk"} <= {check["check"] for check in checks}


def test_ctrl_c_during_an_answer_stops_it_and_again_interrupts() -> None:
    class Stoppable(FakeSession):
        stopped = 0

        def stop(self) -> None:
            self.stopped += 1

    session = Stoppable("trip", FakeWorker())
    before = signal.getsignal(signal.SIGINT)
    with plain.interruptible(session):  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)
        assert session.stopped == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
