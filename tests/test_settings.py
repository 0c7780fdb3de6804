"""Settings that change while a conversation goes on: budgets at once, ways to rank for new segments only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvchat import learned
from kvchat.cli.app import app
from kvchat.config import Config
from kvchat.errors import ConfigError, InputError
from kvchat.handle import Session
from kvchat.worker import Worker
from tests.test_session import QUESTIONS, SETTINGS
from tests.tiny import make_model


class Opener:
    """Workers over one store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers: list[Worker] = []

    def __call__(self, **settings: Any) -> Worker:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        config = Config.load(overrides={"store.path": str(self.path), **given}).replaced(
            {key: value for key, value in SETTINGS.items() if key not in given}
        )
        self.workers.append(Worker(config, None, lambda *_: make_model()))
        return self.workers[-1]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    made = Opener(tmp_path / "s.db")
    yield made
    for one in made.workers:
        one.close()


def held(session: Session) -> list[tuple[int, int]]:
    return [(one["rows"], one["rows_total"]) for one in session.stats()["segments"] if one["kind"] == "sealed"]


def methods(session: Session) -> list[str]:
    residence = session._conversation.residence
    return session._call(lambda: [one.header.ranking.method for one in residence.tiers.residents])


def talk(session: Session, turns: int) -> None:
    for number in range(turns):
        session.ask(QUESTIONS[number % len(QUESTIONS)] * 3, max_new_tokens=4)
    session.settle()


def test_a_budget_follows_at_once_and_is_remembered(opener: Opener) -> None:
    worker = opener()
    with worker.open("a") as session:
        talk(session, 4)
        before = held(session)
        session.configure({"compress.keep_ratio": 0.2, "compress.recent_tokens": 0})
        less = held(session)
        assert sum(rows for rows, _ in less) < sum(rows for rows, _ in before)
        session.configure({"compress.keep_ratio": None, "compress.recent_tokens": None})
        assert held(session) == before
        session.configure({"compress.keep_ratio": 0.2, "compress.recent_tokens": 0})
    worker.close()
    with opener().open("a") as session:
        assert held(session) == less
        assert session.fork("b").stats()["keep_ratio"] == session.stats()["keep_ratio"]


def test_another_way_to_rank_applies_to_new_segments_only(opener: Opener) -> None:
    with opener().open("a") as session:
        talk(session, 2)
        session.configure({"compress.scorer": "keydiff", "compress.allocate": "uniform"})
        talk(session, 2)
        session.configure(
            {"compress.scorer": "snapkv", "compress.aggregate": "defensive", "compress.allocate": "coverage"}
        )
        talk(session, 2)
        assert list(dict.fromkeys(methods(session))) == ["kvzip", "keydiff-uniform", "snapkv.defensive-coverage"]
        before = session.logprobs("And now?", "Yes.")
    with opener().open("a") as session:
        assert list(dict.fromkeys(methods(session))) == ["kvzip", "keydiff-uniform", "snapkv.defensive-coverage"]
        assert session.logprobs("And now?", "Yes.") == before


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("compress.keep_ratio", 7, "less than or equal to 1"),
        ("compress.scorer", "best", "must be one of kvzip"),
        ("compress.scorer", "no.such:Scorer", "is code"),
        ("compress.allocate", "evolved", "kvchat tune"),
        ("compress.scorer", "gate", "kvchat fit"),
        ("model.name", "other", "cannot be set for one session"),
    ],
)
def test_a_wrong_setting_changes_nothing(opener: Opener, tmp_path: Path, setting: str, value: Any, words: str) -> None:
    with opener(compress__learned=str(tmp_path / "none")).open("a") as session:
        talk(session, 2)
        before = session._conversation.residence.config
        with pytest.raises((ConfigError, InputError), match=words):
            session.configure({setting: value})
        assert session._conversation.residence.config == before and not session._conversation.info.settings


def test_what_is_set_for_a_run_goes_before_a_sessions_own(opener: Opener) -> None:
    worker = opener()
    with worker.open("a") as session:
        session.configure({"compress.keep_ratio": 0.2})
    worker.close()
    with opener(compress__keep_ratio=0.7).open("a") as session:
        assert session._conversation.residence.config.compress.keep_ratio == 0.7


def test_what_is_set_while_chatting_goes_before_what_was_set_for_the_run(opener: Opener) -> None:
    with opener(compress__keep_ratio=0.7).open("a") as session:
        session.configure({"compress.keep_ratio": "0.3"})
        assert session._conversation.residence.config.compress.keep_ratio == 0.3
        with pytest.raises(ConfigError, match="keep_ratio"):
            session.configure({"compress.keep_ratio": "abc"})
        assert session._conversation.info.settings == {"compress.keep_ratio": "0.3"}


def test_weights_of_another_kind_are_refused_before_anything_changes(opener: Opener, tmp_path: Path) -> None:
    with opener(compress__learned=str(tmp_path)).open("a") as session:
        before = session._conversation.residence.config
        for kind in ("gate", "kvp"):
            learned.save_weights(make_model(), kind, before.compress, {"other": torch.zeros(1)})
            with pytest.raises(InputError, match=r"other tensors|kvchat fit"):
                session.configure({"compress.scorer": kind})
            assert session._conversation.residence.config == before
        talk(session, 2)
        assert methods(session) == ["kvzip"] * len(methods(session))


def test_a_session_brings_no_code_along(opener: Opener) -> None:
    with opener().open("a") as session, pytest.raises(ConfigError, match="is code"):
        session.configure({"compress.scorer": "os:system"})
    for name in (".os:system", "os.:system", "os:system:x"):
        with pytest.raises(ConfigError, match=r"compress\.scorer"):
            opener(compress__scorer=name)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        opener(compress__scorer="no.such:Scorer").open("b")


def test_a_scorer_that_cannot_be_used_leaves_no_session(opener: Opener, tmp_path: Path) -> None:
    worker = opener(compress__scorer="gate", compress__learned=str(tmp_path / "none"))
    with pytest.raises(InputError, match="kvchat fit"):
        worker.open("fresh")
    assert worker.sessions() == []


def test_settings_that_can_no_longer_be_used_say_how_to_take_them_away(opener: Opener, tmp_path: Path) -> None:
    worker = opener()
    worker.open("a").close()
    worker.jobs.call(lambda: worker._store.set_settings(1, {"compress.scorer": "gate"}))
    worker.close()
    with pytest.raises(ConfigError, match=r"kvchat set a compress\.scorer="):
        opener(compress__learned=str(tmp_path / "none")).open("a")
    result = CliRunner().invoke(app, ["set", "a", "compress.scorer=", "--store", str(opener.path)], obj={})
    assert "no settings" in result.output
    opener().open("a").close()


def test_segments_of_other_weights_have_other_names(opener: Opener, tmp_path: Path) -> None:
    config = opener(compress__learned=str(tmp_path)).config.compress.model_copy(update={"scorer": "gate"})
    names = []
    for seed in (1, 2):
        source = torch.Generator().manual_seed(seed)
        weights = {"weight": torch.randn(3, 2, 64, generator=source) / 9, "bias": torch.randn(3, 2, generator=source)}
        learned.save_weights(make_model(), "gate", config, weights)
        with opener(compress__learned=str(tmp_path), compress__scorer="gate").open(f"s{seed}") as session:
            talk(session, 2)
            names += [*dict.fromkeys(methods(session))]
    assert len(set(names)) == 2 and all(name.startswith("gate@") for name in names)


def test_the_command_shows_and_changes_them(opener: Opener) -> None:
    worker = opener()
    worker.open("a").close()
    worker.close()
    runner, store = CliRunner(), ["--store", str(opener.path)]
    assert "no settings" in runner.invoke(app, ["set", "a", *store], obj={}).output
    assert (
        runner.invoke(app, ["set", "a", "compress.keep_ratio=0.3", *store], obj={}).output
        == "compress.keep_ratio=0.3\n"
    )
    wrong = runner.invoke(app, ["set", "a", "compress.keep_ratio=3", *store], obj={})
    assert isinstance(wrong.exception, ConfigError)
    with opener().open("a") as session:
        assert session._conversation.residence.config.compress.keep_ratio == 0.3
    assert runner.invoke(app, ["set", "a", "compress.keep_ratio=", "--json", *store], obj={}).output == "{}\n"


def test_the_readmes_scorer_of_your_own_runs(opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (code,) = re.findall(r'```python\n("""question\.py""".*?)```', readme, re.DOTALL)
    assert len(code.splitlines()) <= 22
    (tmp_path / "question.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with opener(compress__scorer="question:Question").open("a") as session:
        talk(session, 3)
        assert set(methods(session)) == {"question:Question"}
        before = session.logprobs("And now?", "Yes.")
    with opener().open("a") as session:  # its segments serve whoever has them
        assert session.logprobs("And now?", "Yes.") == before
