"""Facts about encrypted stores: nothing can be read without the key, everything works with it, no crash loses one."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import keyring
import numpy as np
import pytest
from keyring.backend import KeyringBackend
from keyring.backends.fail import Keyring as NoKeyring
from keyring.backends.null import Keyring as Forgetful
from keyring.errors import KeyringLocked

import kvchat
from kvchat import download, keys, opening, tui
from kvchat.bench import history, llama_cpp
from kvchat.cipher import PLAIN, Key, salt, sqlcipher
from kvchat.cli.app import main
from kvchat.codecs.frame import pack
from kvchat.config import Config
from kvchat.errors import CorruptFrame, StoreError
from kvchat.store import kv as kv_store
from kvchat.store import migrations, recrypt
from kvchat.store.migrations import PAGE_SIZE, open_database
from kvchat.store.salvage import copy_beside
from kvchat.store.shed import Allowance
from kvchat.store.store import Store
from kvchat.worker import Worker
from tests.crash_child import QUESTIONS, SETTINGS
from tests.store_parts import bytes_on_disk, converse, segment
from tests.tiny import make_model

SECRET = b"periwinkle"
READABLE = (SECRET, b"trip to Rome", b"CREATE TABLE", b"assistant", b"tiny")
PASSPHRASE = 'it\'s "naïve" -- пароль'
ROOT = Path(__file__).resolve().parent.parent


class Ring(KeyringBackend):
    """A keyring in memory."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


class Unusable(Ring):
    """A keyring that cannot be read."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def get_password(self, service: str, username: str) -> str | None:
        raise self.error


ROUNDS = keys.ROUNDS


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passphrase becomes a key in one round, where that is not the subject."""
    monkeypatch.setattr(keys, "ROUNDS", 1)


@pytest.fixture(autouse=True)
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    before, ring = keyring.get_keyring(), Ring()
    keyring.set_keyring(ring)
    yield ring
    keyring.set_keyring(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plain store with the session "trip to Rome" of two turns, and KV of some pages."""
    return made(tmp_path / "s.db", None)


def made(path: Path, key: Key | None) -> Path:
    with closing(Store(path, key=key)) as store:
        _, chain = converse(store, "trip to Rome", "Hello", "Hi", "What grows there?", f"Vines and {SECRET.decode()}.")
        for first, last in ((0, 2), (2, 4)):
            record, frames = segment(chain, first, last)
            rows = np.random.default_rng(first).integers(0, 255, 120_000, np.uint8)
            bodies = [(chunk, grp, pack({"chunk": chunk, "grp": grp}, {"rows": rows})) for chunk, grp, _ in frames]
            store.put_segment(record, bodies)
    return path


def start(path: Path, key: Key | None = None, **settings: Any) -> Worker:
    given = {**SETTINGS, "codec.name": "k8v8", "store.path": str(path), **settings}
    return Worker(Config.load(overrides=given), None, lambda *_: make_model(), key=key)


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on the store, with the tiny model; what it printed."""

    def run(*argv: str, code: int = 0) -> tuple[str, str]:
        settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
        flags = [argv[0], "--store", str(path), *settings, *argv[1:]]

        def worker(config: Config, listener: Any, key: Key | None) -> Worker:
            return Worker(config, listener, lambda *_: make_model(), key=key)

        assert main(flags, worker) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return out, err

    return run


def refused(run: Run, *argv: str) -> str:
    """The one line of a command that ends with exit code 1."""
    out, err = run(*argv, code=1)
    assert not out and re.fullmatch(r"kvchat: .*\n", err), err
    assert "internal error" not in err
    return err


def whole(path: Path, key: Key | None) -> None:
    """All of the store is there, and nothing else lies beside it."""
    with closing(Store(path, key=key)) as store:
        assert [message.content for message in store.path(store.session("trip to Rome").tip)][-1].endswith("winkle.")
        assert store.verify() == [] and store.stats()["segments"] == 2
        [hit] = store.search(SECRET.decode())
        assert hit.session == "trip to Rome"
    # A kill may leave a journal that is over, which holds a page of the old file and is overwritten by the next.
    assert {file.name for file in path.parent.glob("*.db*")} <= {path.name, f"{path.name}-journal"}


# -- what lies on the disk ---------------------------------------------------------------------------------------------


def test_nothing_can_be_read_in_the_file_its_log_and_its_copy(
    path: Path, run: Run, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(any(word in data for data in bytes_on_disk(path)) for word in READABLE)
    copies = []

    def replace(copy: Path, target: Path) -> None:
        copies.append([*bytes_on_disk(copy)])
        os.rename(copy, target)

    with path.open("rb") as old:
        monkeypatch.setattr(recrypt.os, "replace", replace)
        said = run("encrypt")
        assert not any(old.read())  # what lay there is overwritten
    [key] = ring.kept.values()
    with closing(Store(path, key=keys.find_key(path))) as store:
        converse(store, "another trip to Rome", f"more {SECRET.decode()}")
        store._db.execute("CREATE TEMP TABLE sorted AS SELECT * FROM messages ORDER BY content")
        files = [*bytes_on_disk(path)]
        assert len(files) == 3  # with a log that is not empty, and its index
    for data in (*files, *copies[0], *bytes_on_disk(path)):
        assert not any(word in data for word in (*READABLE, key.encode(), bytes.fromhex(key)))
    assert key not in "".join(said) + repr(keys.find_key(path)) + str(keys.find_key(path))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_store_that_is_not_there_is_made_encrypted(tmp_path: Path, run: Run, path: Path) -> None:
    path.unlink()
    run("encrypt")
    assert salt(path) is not None and run("ls")[1].startswith("no sessions yet")
    path.unlink()
    path.touch()
    run("encrypt")
    run("ask", "trip", "Hello")
    assert salt(path) is not None and b"Hello" not in path.read_bytes()


def test_a_store_that_is_begun_with_the_variable_set_is_encrypted(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.unlink()
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    run("ask", "trip", "Hello")
    assert salt(path) is not None and "Hello" in run("show", "trip")[0]


# -- with the key ------------------------------------------------------------------------------------------------------


def test_a_session_goes_on_bit_for_bit_as_from_a_plain_store(tmp_path: Path) -> None:
    plain, copy = tmp_path / "s.db", tmp_path / "copy.db"
    worker = start(plain)
    with worker.open("trip") as session:
        for question in QUESTIONS[:2]:
            session.ask(question)
        session.settle()
    worker.close()
    shutil.copy(plain, copy)
    key = keys.new_key()
    recrypt.recrypt(copy, None, key)
    said = []
    for store, one in ((plain, None), (copy, key)):
        worker = start(store, one)
        with worker.open("trip") as session:
            reply = session.ask(QUESTIONS[2])
            assert reply.usage.cached_tokens > 150
            said.append((reply.text, reply.usage, session.logprobs("Where?", " Rome")))
        worker.close()
    assert said[0] == said[1]


def test_every_command_works(run: Run, path: Path, tmp_path: Path) -> None:
    run("encrypt")
    for question in QUESTIONS[:2]:
        run("ask", "chat", question)
    assert len(json.loads(run("ls", "--json")[0])) == 2
    run("fork", "chat", "other", "--at", "1")
    run("rename", "other", "third")
    assert "Rome" in run("show", "third")[0] and "river" not in run("show", "third")[0]
    assert {hit["session"] for hit in json.loads(run("search", "cost", "--json")[0])} == {"chat"}
    for format in ("md", "kvchat"):
        _, err = run("export", "chat", "--format", format, "--output", str(tmp_path / f"chat.{format}"))
        assert "the store is encrypted; what was written here is not\n" in err
        run("import", str(tmp_path / f"chat.{format}"), "--name", f"from-{format}")
    assert run("verify", "chat", "--deep") and "answers as recorded" in run("verify", "chat", "--deep")[0]
    run("archive", "chat")
    run("rm", "trip to Rome", "--yes")
    assert "before" in run("vacuum")[0] and run("verify")[0] == "no problems\n"
    states = {row["check"]: row for row in json.loads(run("doctor", "--json")[0])}
    assert states["encryption"]["detail"] == "SQLCipher, opened with the key in the keyring"
    run("decrypt")
    assert run("verify")[0] == "no problems\n" and path.read_bytes().startswith(PLAIN)
    assert "encrypted" not in run("export", "chat")[1]


def test_a_damaged_page_of_kv_is_found_and_mended_with_the_key(path: Path, run: Run) -> None:
    run("encrypt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 // PAGE_SIZE * PAGE_SIZE + 100] ^= 1
    path.write_bytes(data)
    with closing(Store(path, key=keys.find_key(path))) as store:
        ids = [row["id"] for row in store._rows("SELECT id FROM segments")]
        with pytest.raises(CorruptFrame, match="cannot be read: database disk image is malformed"):
            [*chain.from_iterable(store.frames(one, [0, 1]) for one in ids)]
        store.rename("trip to Rome", "trip")  # it goes on, as a plain one does
        store.rename("trip", "trip to Rome")
    assert "--repair` mends it" in run("verify", code=1)[0]
    run("verify", "--repair")
    assert run("verify")[0] == "no problems\n" and SECRET.decode() in run("show", "trip to Rome")[0]
    assert not any(word in file for file in bytes_on_disk(path) for word in READABLE)


def test_a_disk_budget_holds(path: Path, run: Run) -> None:
    run("encrypt")
    budget = 600_000  # tables and indexes alone take 540 kB: a page of 16 KiB each, at least
    with closing(Store(path, allowance=Allowance(budget, 0), key=keys.find_key(path))) as store:
        assert store.room().in_use > budget and store.shed() > 0
        assert store.room().in_use <= budget and store.verify() == []


def test_a_key_in_the_keyring_is_named_by_the_files_first_bytes(path: Path, run: Run, ring: Ring) -> None:
    run("encrypt")
    [(service, user)] = ring.kept
    assert service == "kvchat" and bytes.fromhex(user) == salt(path) == path.read_bytes()[:16]
    run("vacuum")
    moved = path.rename(path.with_name("moved.db"))
    assert main(["ls", "--store", str(moved)]) == 0
    run_on_moved = keys.find_key(moved)
    assert run_on_moved is not None and run_on_moved.source == "the key in the keyring"


def test_a_passphrase_of_any_signs(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, ring: Ring) -> None:
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    run("encrypt", "--passphrase")
    assert not ring.kept and PASSPHRASE not in "".join(run("doctor"))
    monkeypatch.setenv(keys.VARIABLE, unicodedata.normalize("NFD", PASSPHRASE))
    assert "trip to Rome" in run("ls")[0]
    run("decrypt")
    monkeypatch.delenv(keys.VARIABLE)
    whole(path, None)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed at a terminal, the next at the end."""
    lines: list[str] = []

    def ask(prompt: str) -> str:
        assert threading.current_thread() is threading.main_thread()
        return lines.pop()

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", ask)
    return lines


def test_a_passphrase_is_asked_for_at_a_terminal_once(
    path: Path, run: Run, typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed += ["other", PASSPHRASE]
    assert "the two passphrases differ" in refused(run, "encrypt", "--passphrase")
    assert path.read_bytes().startswith(PLAIN)
    typed += [PASSPHRASE, PASSPHRASE]
    run("encrypt", "--passphrase")
    typed += [PASSPHRASE]
    run("verify", "--deep")  # opens the store twice
    assert not typed
    typed += ["wrong"]
    assert "encrypted with another key than the passphrase that was typed" in refused(run, "ls")
    shown: list[Any] = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(tui, "run", lambda connect, *_, **__: shown.append((len(typed), connect)))
    typed += [PASSPHRASE]
    run("chat")
    [(left, connect)] = shown
    assert left == 0  # before the screen
    worker = connect(lambda _: None)
    assert [info.name for info in worker.sessions()] == ["trip to Rome"]
    worker.close()


def test_kvchat_open_takes_a_passphrase(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "Worker", lambda *args, **given: Worker(*args, lambda *_: make_model(), **given))
    new = tmp_path / "new.db"
    for _ in range(2):
        with kvchat.open("trip", store=new, passphrase=PASSPHRASE, settings=SETTINGS) as chat:
            chat.ask("Hello?")
    assert salt(new) is not None
    with pytest.raises(StoreError, match="another key than the passphrase that was given") as caught:
        kvchat.open("trip", store=new, passphrase="wrong")
    assert PASSPHRASE not in str(caught.value)
    with pytest.raises(StoreError, match="is not encrypted and takes no passphrase"):
        kvchat.open("trip to Rome", store=path, passphrase=PASSPHRASE)


def test_a_passphrase_gives_the_key_that_sqlcipher_derives_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "ROUNDS", ROUNDS)
    path = tmp_path / "s.db"
    with closing(sqlcipher().connect(path)) as db:
        db.execute("PRAGMA key = 'plain words'")
        db.execute(f"PRAGMA cipher_page_size = {PAGE_SIZE}")
        db.execute("CREATE TABLE words AS SELECT 'periwinkle'")
    key = keys.find_key(path, "plain words")
    assert key is not None
    with closing(migrations.connect(path, 1.0, key, PAGE_SIZE)) as db:
        assert db.execute("SELECT * FROM words").fetchall() == [("periwinkle",)]


def test_a_passphrase_that_looks_like_a_key_is_a_passphrase(tmp_path: Path) -> None:
    key = keys.find_key(tmp_path / "s.db", f"x'{'1' * 96}'")
    assert key is not None and key.secret != f"x'{'1' * 96}'" and re.fullmatch("x'[0-9a-f]{96}'", key.secret)


def test_a_passphrase_is_derived_once_however_often_the_store_is_opened(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    run("encrypt", "--passphrase")
    key, calls = keys.find_key(path), list[str]()
    monkeypatch.setattr(keys, "_derived", calls.append)
    for _ in range(2):
        whole(path, key)
    assert calls == [] and key is not None and key.salt == path.read_bytes()[:16].hex()


def test_two_that_begin_one_store_at_once_do_not_take_it_for_damaged(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    first, second = (keys.find_key(path, PASSPHRASE) for _ in range(2))
    Store(path, key=first).close()
    with pytest.raises(StoreError, match="was made or encrypted by another kvchat meanwhile; try again"):
        Store(path, key=second)
    Store(path, key=keys.find_key(path, PASSPHRASE)).close()


def test_the_format_does_not_follow_the_default_of_a_later_sqlcipher(path: Path, tmp_path: Path) -> None:
    template, key = made(tmp_path / "template", None), keys.new_key()
    recrypt.recrypt(path, None, key)
    with closing(sqlcipher().connect(":memory:")) as db:
        db.execute("PRAGMA cipher_default_compatibility = 3")
        try:
            whole(path, key)
            other = keys.new_key()
            recrypt.recrypt(template, None, other)
        finally:
            db.execute("PRAGMA cipher_default_compatibility = 4")
    template.rename(path)
    whole(path, other)


def test_encrypt_says_how_to_back_up_a_key_of_the_keyring(
    path: Path, run: Run, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = run("encrypt")
    [(service, user)] = ring.kept
    assert f"`keyring get {service} {user}`" in out and user == path.read_bytes()[:16].hex()
    run("decrypt")
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    assert "keyring get" not in "".join(run("encrypt", "--passphrase"))


# -- what can go wrong on the way --------------------------------------------------------------------------------------


def damaged(path: Path, key: Key) -> bytes:
    """Encrypt a store, and harm a page of its KV."""
    recrypt.recrypt(path, None, key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 // PAGE_SIZE * PAGE_SIZE + 100] ^= 1
    path.write_bytes(data)
    return bytes(data)


def test_a_repair_has_all_in_the_file_that_takes_the_others_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, fill, logs = keys.new_key(), recrypt.fill, list[bool]()
    damaged(path, key)

    def filled(made: Any, reader: Any) -> None:
        fill(made, reader)
        logs.append(copy_beside(path).with_name(f"{copy_beside(path).name}-wal").exists())

    monkeypatch.setattr(recrypt, "fill", filled)
    with closing(Store(path, key=key)) as store:
        store.repair()
        assert store.session("trip to Rome").num_turns == 2 and logs == [False]


def test_a_copy_of_which_the_log_could_not_be_folded_takes_nobodys_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.new_key()
    before = damaged(path, key)

    def unfolded(copy: Path) -> None:
        copy.with_name(f"{copy.name}-wal").write_bytes(b"frames")

    with pytest.raises(StoreError, match=r"the copy of .* could not be written; is the disk full\? Nothing was"):
        recrypt.salvage_encrypted(path, key, unfolded)
    assert path.read_bytes()[PAGE_SIZE:] == before[PAGE_SIZE:]
    assert [file.name for file in path.parent.iterdir()] == ["s.db"]


def test_other_names_of_the_file_keep_what_they_have(path: Path, run: Run) -> None:
    backup = path.with_name("backup")
    os.link(path, backup)
    assert "encrypted; the old bytes could not be overwritten: they have another name\n" in run("encrypt")[1]
    assert SECRET in backup.read_bytes() and salt(path) is not None
    backup.rename(path)
    whole(path, None)


@pytest.mark.parametrize("step", ["_wipe", "_sync"])
def test_what_fails_after_the_copy_took_the_files_place_does_not_say_that_nothing_changed(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    function = getattr(recrypt, step)

    def fails(what: Any) -> None:
        if what == path.parent or step == "_wipe":
            raise OSError(5, "Input/output error")
        function(what)

    monkeypatch.setattr(recrypt, step, fails)
    with path.open("rb") as old:
        said = "".join(run("encrypt"))
        assert any(old.read())  # which a power cut may bring back, if the folder is not on the disk
    assert "encrypted; the old bytes could not be overwritten: Input/output error\n" in said
    assert "nothing was changed" not in said and salt(path) is not None


def test_only_what_was_not_encrypted_is_overwritten(path: Path, run: Run) -> None:
    run("encrypt")
    with path.open("rb") as old:
        run("decrypt")
        assert any(old.read())


def test_the_log_that_a_killed_process_left_is_overwritten_too(path: Path) -> None:
    code = "import os, signal\nfrom tests.store_parts import converse\nconverse(Store(path), 'killed', 'periwinkles')\n"
    with other(f"{code}os.kill(os.getpid(), signal.SIGKILL)", path) as process:
        process.communicate()
    with path.with_name("s.db-wal").open("rb") as log:
        assert SECRET in log.read()
        log.seek(0)
        recrypt.recrypt(path, None, keys.new_key())
        assert not any(log.read())


def test_files_of_the_user_beside_the_store_stay(path: Path, run: Run) -> None:
    mine = [path.with_name(name) for name in ("s.db-salvage", "s.db-salvage-damaged")]
    for file in mine:
        file.write_bytes(b"mine")
    copy_beside(path).mkdir()
    run("ls")
    assert "File exists" in refused(run, "encrypt")
    copy_beside(path).rmdir()
    copy_beside(path).symlink_to(mine[0])
    assert "File exists" in refused(run, "encrypt")
    copy_beside(path).unlink()
    copy_beside(path).write_bytes(b"left by a kill")
    run("encrypt")
    assert [file.read_bytes() for file in mine] == [b"mine"] * 2 and not copy_beside(path).exists()


def test_the_mode_and_the_owner_stay(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1234)
    before = path.stat()
    run("encrypt")
    now = path.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (before.st_mode, before.st_uid, before.st_gid)

    def forbidden(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(recrypt.os, "chown", forbidden)
    assert "belongs to another user or group: nothing was changed" in refused(run, "decrypt")
    assert salt(path) is not None and not copy_beside(path).exists()


def test_a_connection_that_cannot_be_had_again_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, tries = keys.new_key(), list[Path]()
    damaged(path, key)

    def busy_once(file: Path, *rest: Any) -> Any:
        tries.append(file)
        if len(tries) == 1:
            raise StoreError("busy")
        return open_database(file, *rest)

    with closing(Store(path, key=key)) as store:
        monkeypatch.setattr(kv_store, "open_database", busy_once)
        ids = [row["id"] for row in store._rows("SELECT id FROM segments")]
        with pytest.raises(CorruptFrame, match="cannot be read"):
            [*chain.from_iterable(store.frames(one, [0, 1]) for one in ids)]
        assert len(tries) == 1
        with pytest.raises(StoreError, match="is damaged"):
            store.rename("trip to Rome", "trip")
        store.rename("trip to Rome", "trip")
        assert len(tries) == 2 and store.session("trip").num_turns == 2


def test_a_repair_that_cannot_open_the_file_again_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keys.new_key()
    damaged(path, key)

    def busy(*_: Any) -> None:
        raise StoreError("busy")

    with closing(Store(path, key=key)) as store:
        monkeypatch.setattr(kv_store, "open_database", busy)
        monkeypatch.setattr(recrypt, "fill", busy)
        with pytest.raises(StoreError, match="was closed to be mended, and cannot be opened again: busy"):
            store.mend_pages()


def test_programs_that_open_no_store_are_not_given_the_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    seen: list[dict[str, str]] = []

    def started(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.append(env)
        raise OSError("stop here")

    monkeypatch.setattr(subprocess, "Popen", started)
    for begins in (
        lambda: download.pip_download(tmp_path, print),
        lambda: history.in_new_process({}),
        lambda: llama_cpp._process({}, tmp_path / "log").__enter__(),
    ):
        with pytest.raises(OSError, match="stop here"):
            begins()
    assert len(seen) == 3 and all("PATH" in one and keys.VARIABLE not in one for one in seen)


# -- without the key ---------------------------------------------------------------------------------------------------


def test_without_the_right_key_there_is_one_line_and_nothing_changes(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, ring: Ring
) -> None:
    run("encrypt")
    before = path.read_bytes()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    ring.kept.clear()
    commands = (["ls"], ["ask", "x", "y"], ["verify", "--repair"], ["decrypt"], ["vacuum"], ["chat", "--plain"])
    for command in commands:
        assert f"the keyring has no key for it: set {keys.VARIABLE}" in refused(run, *command)
    keyring.set_keyring(NoKeyring())
    assert f"set {keys.VARIABLE}" in refused(run, "ls")
    assert "is encrypted already, or damaged" in refused(run, "encrypt")
    monkeypatch.setenv(keys.VARIABLE, "wrong")
    for command in commands[1:4]:
        assert f"another key than the passphrase in {keys.VARIABLE}" in refused(run, *command)
    assert "another key than" in json.dumps(json.loads(run("doctor", "--json", code=1)[0]))
    monkeypatch.setitem(sys.modules, "sqlcipher3", None)
    for command in commands:
        assert "install it with `pip install 'kvchat[crypt]'`" in refused(run, *command)
    assert path.read_bytes() == before and [file.name for file in path.parent.glob("*.db*")] == ["s.db"]


@pytest.mark.parametrize(
    "error",
    [
        KeyringLocked("Failed to unlock the collection!"),
        ImportError("no such backend"),
        AttributeError("no such class"),
        RuntimeError("the bus went away"),
        OSError("the bus went away"),
    ],
)
def test_a_keyring_that_cannot_be_read_is_one_line_and_nobody_is_asked_for_a_passphrase(
    run: Run, typed: list[str], error: Exception
) -> None:
    run("encrypt")
    keyring.set_keyring(Unusable(error))
    assert f"the keyring cannot be read ({error}): unlock it, or set {keys.VARIABLE}" in refused(run, "ls")
    states = {row["check"]: row for row in json.loads(run("doctor", "--json", code=1)[0])}
    assert "the keyring cannot be read" in states["store"]["detail"] and states["disk"]["state"]


def test_a_store_is_not_encrypted_with_a_keyring_that_cannot_be_used(run: Run, path: Path) -> None:
    keyring.set_keyring(Unusable(RuntimeError("the bus went away")))
    assert "the keyring cannot be used (the bus went away); use --passphrase: nothing was" in refused(run, "encrypt")
    whole(path, None)


def test_a_store_is_not_encrypted_with_a_key_that_nobody_keeps(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    keyring.set_keyring(NoKeyring())
    assert "the keyring cannot be used (No recommended backend was available); use --pass" in refused(run, "encrypt")
    keyring.set_keyring(Forgetful())
    assert "the keyring does not keep what it is given" in refused(run, "encrypt")
    assert "there is no terminal to type a passphrase at" in refused(run, "encrypt", "--passphrase")
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    assert "would be tried before the keyring" in refused(run, "encrypt")
    monkeypatch.delenv(keys.VARIABLE)
    assert "is not encrypted" in refused(run, "decrypt")
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "install it with `pip install 'kvchat[crypt]'`" in refused(run, "encrypt")
    monkeypatch.setitem(sys.modules, "sqlcipher3", None)
    assert "install it with `pip install 'kvchat[crypt]'`" in refused(run, "encrypt", "--passphrase")
    assert path.read_bytes() == before


def test_a_file_of_which_the_first_bytes_are_damaged_is_said_to_be_one_or_the_other(path: Path, run: Run) -> None:
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])
    assert "is encrypted, or damaged" in refused(run, "ls")
    before = path.read_bytes()
    for opens in (lambda: Store(path), lambda: start(path)):
        with pytest.raises(StoreError, match="is encrypted, or damaged: give its key") as caught:
            opens()
        assert "start anew" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_store_that_is_written_over_by_an_encrypted_one_is_seen_to_be_encrypted(tmp_path: Path, path: Path) -> None:
    assert salt(path) is None
    shutil.copyfile(made(tmp_path / "other.db", keys.new_key()), path)
    assert salt(path) == path.read_bytes()[:16]


def test_a_plain_store_loads_no_package_of_encryption(path: Path) -> None:
    code = (
        f"import sys; from kvchat.cli.app import main; main(['search', 'vines', '--store', {str(path)!r}]);"
        "print({'sqlcipher3', 'keyring'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n") and SECRET.decode() in done.stdout


# -- several processes, and crashes ------------------------------------------------------------------------------------


def other(code: str, path: Path, **rest: str) -> subprocess.Popen[str]:
    """Another process, with a passphrase in its environment."""
    begin = "import sys\nfrom pathlib import Path\nfrom kvchat import keys\nkeys.ROUNDS = 1"
    begin += "\nfrom kvchat.store.store import Store"
    lines = f"{begin}\npath = Path({str(path)!r})\n{code}"
    environment = {**os.environ, keys.VARIABLE: PASSPHRASE, **rest}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", lines], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


HOLD = "from kvchat.keys import find_key\nstore = Store(path, key=find_key(path))\nprint('open', flush=True)\ninput()\n"


def test_two_processes_use_one_store_and_none_encrypts_it_meanwhile(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other(HOLD, path) as process:
        assert process.stdout and process.stdout.readline() == "open\n"
        assert "is open in another kvchat; close that first: nothing was changed" in refused(run, "encrypt")
        process.communicate("\n")
    monkeypatch.setenv(keys.VARIABLE, PASSPHRASE)
    run("encrypt", "--passphrase")
    with closing(Store(path, key=keys.find_key(path))) as store:
        with other(HOLD + "store.rename('trip to Rome', 'rome')", path) as process:
            assert process.stdout and process.stdout.readline() == "open\n"
            assert "is open in another kvchat" in refused(run, "decrypt")
            converse(store, "mine", "Hello")
            assert process.communicate("\n")[1] == ""
        assert {info.name for info in store.sessions()} == {"rome", "mine"} and store.verify() == []


def test_finding_the_key_of_a_store_that_is_open_here_does_not_open_it_to_others(path: Path) -> None:
    with closing(Store(path)):
        keys.find_key(path)
        keys.find_key(path)
        with other(
            "from kvchat.cli.app import main\nmain(['encrypt', '--passphrase', '--store', str(path)])", path
        ) as process:
            assert "is open in another kvchat" in process.communicate()[1]
    whole(path, None)


@pytest.mark.parametrize(("encrypts", "linked"), [(True, False), (True, True), (False, False)])
def test_who_waits_for_a_store_that_is_being_encrypted_does_not_write_to_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, encrypts: bool, linked: bool
) -> None:
    if linked:
        os.link(path, path.with_name("backup"))
    key, waiting = keys.new_key(), list[subprocess.Popen[str]]()
    before, after = (None, key) if encrypts else (key, None)
    if not encrypts:
        recrypt.recrypt(path, None, key)
    given = f"Key({before.secret!r}, '')" if before else None

    def replace(copy: Path, target: Path) -> None:
        code = f"from kvchat.cipher import Key\nprint('ready', flush=True)\nstore = Store(path, key={given})"
        process = other(f"{code}\nstore.create_session('ghost', 'tiny', {{}})", path)
        assert process.stdout and process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        waiting.append(process)
        os.rename(copy, target)

    monkeypatch.setattr(recrypt.os, "replace", replace)
    recrypt.recrypt(path, before, after)
    assert "was encrypted or decrypted by another kvchat meanwhile; try again" in waiting[0].communicate()[1]
    whole(path, after)


def test_a_copy_that_is_not_equal_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, contents = path.read_bytes(), recrypt._contents
    monkeypatch.setattr(recrypt, "_contents", lambda db: {**contents(db), ("table", str(id(db)), ""): 1})
    with pytest.raises(StoreError, match=r"the copy does not hold what the store holds; .* nothing was changed"):
        recrypt.recrypt(path, None, keys.new_key())
    monkeypatch.undo()
    assert path.read_bytes()[100:] == before[100:] and not copy_beside(path).exists()
    whole(path, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that each kill costs little")
@pytest.mark.parametrize("encrypts", [True, False], ids=["encrypt", "decrypt"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_store_whole(tmp_path: Path, encrypts: bool) -> None:
    key = keys.new_key()
    before, after = (None, key) if encrypts else (key, None)
    template, path, source = made(tmp_path / "template.db", before), tmp_path / "s" / "s.db", random.Random(0)
    path.parent.mkdir()
    begun = time.perf_counter()
    shutil.copy(template, path)
    recrypt.recrypt(path, before, after)
    longest, outcomes = time.perf_counter() - begun, set()
    steps = [*("_copied", "_contents", "_sync", "_wipe"), *(source.uniform(0, longest) for _ in range(6))]
    for step in steps:
        path.unlink()
        shutil.copy(template, path)
        pid = os.fork()
        if pid == 0:
            if isinstance(step, str):
                setattr(recrypt, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            recrypt.recrypt(path, before, after)
            os._exit(0)
        if isinstance(step, float):
            time.sleep(step)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, 0)
        changed = (salt(path) is not None) == encrypts
        outcomes.add(changed)
        whole(path, after if changed else before)
    assert outcomes == {True, False}
