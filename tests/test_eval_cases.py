"""Facts about evaluation cases: what is asked can be known, and is asked when it was promised."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvchat.errors import InputError
from kvchat.evals import cases, facts, locomo, planted
from kvchat.evals.cases import Case, Question


def line(day: int, number: int, speaker: str, text: str, **more: Any) -> dict[str, Any]:
    return {"speaker": speaker, "dia_id": f"D{day}:{number}", "text": text, **more}


def question(evidence: list[str], category: int = 4, answer: object = "Rome") -> dict[str, Any]:
    return {"question": f"Where? {evidence}", "answer": answer, "evidence": evidence, "category": category}


@pytest.fixture
def tree() -> dict[str, Any]:
    """Two days. Bea opens, Ada says two things in a row on the first, and the last word, without a reply."""
    return {
        "conversation": {
            "speaker_a": "Ada",
            "speaker_b": "Bea",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                line(1, 1, "Bea", "Hey Ada!"),
                line(1, 2, "Ada", "Hello."),
                line(1, 3, "Ada", "Look.", blip_caption="a photo of a cat", img_url=["nowhere"]),
                line(1, 4, "Bea", "Nice!"),
            ],
            "session_2_date_time": "9 am on 9 May, 2023",
            "session_2": [
                line(2, 1, "Bea", "Me again."),
                line(2, 2, "Ada", "So soon?"),
                line(2, 3, "Bea", "Yes."),
                line(2, 4, "Ada", "Bye."),
            ],
            "session_3_date_time": "10 am on 10 May, 2023",
        },
        "qa": [question(["D1:3"]), question(["D2:4"], category=1), {"category": 5, "question": "?", "evidence": []}],
    }


def saved(document: object, folder: Path) -> Path:
    path = folder / "talk.json"
    path.write_text(json.dumps(document))
    return path


def talk(turns: int, questions: tuple[Question, ...] = (), words: str = "one two") -> Case:
    said = tuple(
        ({"role": "user", "content": f"{words} {turn}"}, {"role": "assistant", "content": f"I see, {turn}."})
        for turn in range(1, turns + 1)
    )
    return Case("talk", "Be brief.", said, questions)


def known_after(*evidence: int, turns: int) -> Case:
    return talk(turns, tuple(Question(f"q{n}", "?", "!", "", "plain", e, turns) for n, e in enumerate(evidence)))


def failure(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        cases.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_locomo_file_is_read_as_a_chat(tree: dict[str, Any], tmp_path: Path) -> None:
    case = cases.read(saved(tree, tmp_path))
    assert case.name == "talk"
    assert (
        case.system
        == "This is a conversation between Ada (user) and Bea (assistant), two friends, over several months."
    )
    assert [[(message["role"], message["content"]) for message in turn] for turn in case.turns] == [
        [("user", "Hi!"), ("assistant", "(1:56 pm on 8 May, 2023) Hey Ada!")],
        [
            ("user", "Hello. Look. [shares a photo of a photo of a cat]"),
            ("assistant", "Nice! (9 am on 9 May, 2023) Me again."),
        ],
        [("user", "So soon?"), ("assistant", "Yes.")],
    ]


@pytest.mark.parametrize(
    ("cited", "turn"),
    [
        (["D1:1"], 1),
        (["D1:2"], 2),
        (["D1:3"], 2),
        (["D2:1", "D1:1"], 2),
        (["D1:1; D2:3"], 3),
        (["D1:1 D1:4"], 2),
        (["D:1:4"], 2),
        (["D01:04"], 2),
        (["D1:1", "D7:7"], 1),
        (["D2:4"], 3),
        (["D"], 3),
        ([], 3),
    ],
)
def test_evidence_is_the_turn_of_the_last_line_that_can_be_found(
    tree: dict[str, Any], cited: list[str], turn: int, tmp_path: Path
) -> None:
    tree["qa"] = [question(cited)]
    case = cases.read(saved(tree, tmp_path))
    assert [(asked.evidence, asked.asked_after) for asked in case.questions] == [(turn, 3)]


def test_questions_without_an_answer_are_left_out_and_numbers_stay(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["qa"] = [question([], 5), question([], 1, 2022), question([], 2), question([], 3), question([], 4)]
    found = cases.read(saved(tree, tmp_path)).questions
    assert [(asked.id, asked.kind) for asked in found] == [
        ("q2", "multi-hop"),
        ("q3", "temporal"),
        ("q4", "open"),
        ("q5", "single-hop"),
    ]
    assert found[0].answer == "2022"


@pytest.mark.parametrize(
    ("where", "value", "problem"),
    [
        (("conversation", "speaker_a"), None, "'speaker_a' is missing or not of type str"),
        (("conversation", "session_1"), {}, "'session_1' is missing or not of type list"),
        (("conversation", "session_1"), ["x"], "'speaker' is missing or not of type str"),
        (("conversation", "session_1"), [line(1, 1, "Cid", "Hi")], "session_1 has a line 'D1:1' of 'Cid'; expected"),
        (("conversation", "session_1_date_time"), 5, "'session_1_date_time' is missing or not of type str"),
        (("conversation",), {"speaker_a": "Ada", "speaker_b": "Bea"}, "its days hold no line that is replied to"),
        (("qa",), {}, "'qa' is missing or not of type list"),
        (("qa",), [{"category": 4, "evidence": [], "question": "?"}], "'answer' is missing or not of type str or int"),
        (("qa",), [{"category": 4, "evidence": "D1:1", "question": "?"}], "'evidence' is missing or not of type list"),
    ],
)
def test_a_broken_locomo_file_is_one_line(
    tree: dict[str, Any], where: tuple[str, ...], value: object, problem: str, tmp_path: Path
) -> None:
    inner = tree
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    assert failure(saved(tree, tmp_path)).startswith(f"not a LoCoMo conversation: {problem}")


def test_files_of_another_shape_are_refused_with_what_was_expected(tree: dict[str, Any], tmp_path: Path) -> None:
    assert failure(saved([tree, tree], tmp_path)) == "holds 2 LoCoMo conversations; split it into one file each"
    expected = "(expected a LoCoMo file or a conversation to import)"
    assert failure(saved({"qa": []}, tmp_path)).endswith(expected)
    assert failure(saved({"conversation": tree["conversation"]}, tmp_path)).endswith(expected)
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xff")
    assert failure(path) == f"not UTF-8 text: byte 0 is 0xff {expected}"


def test_any_other_conversation_gets_general_questions(tmp_path: Path) -> None:
    roles = ["system", "assistant", "user", "user", "assistant", "assistant", "user"]
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]
    case = cases.read(saved({"messages": messages}, tmp_path))
    assert case.system == "system 0"
    assert [[message["content"] for message in turn] for turn in case.turns] == [
        ["assistant 1"],
        ["user 2"],
        ["user 3", "assistant 4", "assistant 5"],
        ["user 6"],
    ]
    assert [asked.text for asked in case.questions] == list(cases.GENERAL)
    assert {(asked.kind, asked.answer, asked.evidence, asked.asked_after) for asked in case.questions} == {
        ("plain", "", 0, 4)
    }
    assert cases.read(saved(messages[1:], tmp_path)).system is None


def test_cut_keeps_what_can_be_known() -> None:
    case = cases.cut(known_after(0, 3, 4, 5, 10, turns=10), 4)
    assert case.turns == talk(4).turns
    assert [(asked.id, asked.asked_after) for asked in case.questions] == [("q0", 4), ("q1", 4), ("q2", 4)]
    whole = known_after(1, 10, turns=10)
    assert cases.cut(whole, 10) == cases.cut(whole, 99) == whole
    with pytest.raises(InputError, match="cannot cut a conversation to 0 turns"):
        cases.cut(whole, 0)


def test_spread_asks_only_what_is_known_and_nothing_twice() -> None:
    case = cases.spread(known_after(*range(1, 101), turns=100), [0.1, 0.5, 1], 20, seed=0)
    assert Counter(asked.asked_after for asked in case.questions) == {10: 10, 50: 20, 100: 20}
    for probe in (10, 50, 100):
        found = cases.asked(case, probe)
        assert len({asked.id for asked in found}) == len(found)
        assert all(asked.evidence <= probe and asked.id == f"q{asked.evidence - 1}@{probe}" for asked in found)
    assert cases.asked(case, 11) == []


@pytest.mark.parametrize("seed", range(5))
def test_spread_is_even_over_age_though_questions_are_not(seed: int) -> None:
    crowded = known_after(*[100] * 80, *range(1, 101), turns=100)
    [*found] = cases.spread(crowded, [1.0], 20, seed).questions
    quarters = Counter((asked.evidence - 1) // 25 for asked in found)
    assert all(4 <= quarters[quarter] <= 6 for quarter in range(4)), quarters


def test_spread_depends_on_the_seed_alone() -> None:
    case = known_after(*[0] * 40, *range(1, 51), turns=50)
    assert cases.spread(case, [0.5, 1], 8, 1) == cases.spread(case, [1, 0.5, 0.5], 8, 1)
    assert cases.spread(case, [0.5, 1], 8, 1) != cases.spread(case, [0.5, 1], 8, 2)
    plain = known_after(*[0] * 40, turns=50)
    assert cases.spread(plain, [1], 8, 1) != cases.spread(plain, [1], 8, 2)


@pytest.mark.parametrize(
    ("at", "count", "problem"),
    [
        ([0.5, 0], 1, "up to 1 of the turns, got 0"),
        ([1.5], 1, "got 1.5"),
        ([float("nan")], 1, "got nan"),
        ([], 1, "got none"),
        ([1], 0, "cannot ask 0 questions"),
    ],
)
def test_spread_refuses_what_lies_outside(at: list[float], count: int, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        cases.spread(talk(3), at, count, 0)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Dog!", "a dog", 1.0),
        ("Jasper  and\nthe Rockies", "Rockies, Jasper", 0.8),
        ("in Rome", "Paris", 0.0),
        ("dog dog dog", "dog", 0.5),
        ("theatre an", "theatre", 1.0),
        ("", "Rome", 0.0),
        ("the", "", 1.0),
        ("7 May 2023", "May 7, 2023", 1.0),
    ],
)
def test_f1_counts_shared_words(prediction: str, answer: str, score: float) -> None:
    assert locomo.f1(prediction, answer) == pytest.approx(score)
    assert locomo.f1(answer, prediction) == pytest.approx(score)


def test_exact_minds_the_order_of_words() -> None:
    assert locomo.exact("The Dog!", "a dog")
    assert not locomo.exact("7 May 2023", "May 7, 2023")


def mentions(case: Case, value: str) -> list[int]:
    """The turns that name the value, from 1."""
    word = re.compile(rf"\b{re.escape(value)}\b", re.IGNORECASE)
    return [n for n, turn in enumerate(case.turns, 1) if any(word.search(message["content"]) for message in turn)]


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_answer_is_told_once_and_at_its_turn(seed: int) -> None:
    filler = talk(120, words="Jazz, lasagna and Oslo, room 412, number")
    case = planted.plant(filler, seed=seed)
    answers = {asked.id.split("@")[0]: asked for asked in case.questions}
    assert len(answers) == len({asked.answer for asked in answers.values()}) == 16
    assert len(case.turns) == max(asked.asked_after for asked in case.questions)
    for asked in answers.values():
        assert mentions(case, asked.answer) == [asked.evidence]
    assert sum(asked.corrected for asked in answers.values()) == 4
    assert {asked.kind for asked in answers.values()} == {"name", "number", "place", "preference"}


@pytest.mark.parametrize("seed", range(20))
def test_a_corrected_fact_was_told_otherwise_before(seed: int) -> None:
    sorts = {sort.id: sort for sort in facts.SORTS}
    case = planted.plant(talk(40, words="on and on,"), [5], seed=seed)
    answers = {asked.answer for asked in case.questions}
    for asked in case.questions:
        sort, text = sorts[asked.id.split("@")[0]], case.turns[asked.evidence - 1][0]["content"]
        correction = any(form.format(sort.subject, asked.answer) in text for form in facts.CORRECTIONS)
        assert correction == asked.corrected
        earlier = case.turns[max(0, asked.evidence - 5) : asked.evidence - 2]
        words = set(re.findall(r"\w+", " ".join(turn[0]["content"] for turn in earlier)))
        if asked.corrected:
            assert words & set(sort.values) - answers
        else:
            assert asked.evidence <= 8


def test_facts_are_asked_for_at_the_distances_asked_for() -> None:
    case = planted.plant(talk(60), [30, 3], facts=5)
    distances = {asked.id: asked.asked_after - asked.evidence for asked in case.questions}
    assert len(distances) == 10
    assert all(distance == int(id.split("@")[1]) for id, distance in distances.items())
    assert Counter(distances.values()) == {3: 5, 30: 5}


def test_the_filler_stays_as_it_was_but_for_what_is_added() -> None:
    filler = talk(40)
    case = planted.plant(filler, [20])
    for old, new in zip(filler.turns, case.turns, strict=False):
        assert new[1] == old[1]
        assert new[0]["content"].startswith(old[0]["content"])
    assert [new == old for old, new in zip(filler.turns, case.turns, strict=False)][12:] == [True] * (
        len(case.turns) - 12
    )
    assert case.system == filler.system


def test_the_same_seed_plants_the_same_and_another_does_not() -> None:
    assert planted.plant(talk(120), seed=1) == planted.plant(talk(120), seed=1)
    assert planted.plant(talk(120), seed=1) != planted.plant(talk(120), seed=2)


def test_long_turns_and_turns_without_a_reply_are_no_filler() -> None:
    short, lone = talk(30), ({"role": "user", "content": "alone"},)
    [long] = talk(1, words="x" * planted.LONGEST_TURN).turns
    mixed = replace(short, turns=(long, lone, *short.turns[:9], long, lone, *short.turns[9:]))
    assert planted.plant(mixed, [10]) == planted.plant(short, [10])


def test_planting_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"talk: 20 of 20 turns .* 1\d\d are needed"):
        planted.plant(talk(20))
    with pytest.raises(InputError, match="distances are numbers of turns from 1, got 5, 0"):
        planted.plant(talk(20), [5, 0])
    with pytest.raises(InputError, match="got none"):
        planted.plant(talk(20), [])
    with pytest.raises(InputError, match="cannot plant 22 facts; expected 1 to 21"):
        planted.plant(talk(20), [5], facts=22)
    with pytest.raises(InputError, match="names every value that favourite kind of music could have"):
        planted.plant(replace(talk(20), system=" ".join(facts.MUSIC)), [2], facts=21)


def test_values_are_many_and_can_be_told_apart() -> None:
    pools = {sort.values for sort in facts.SORTS}
    assert all(len(set(pool)) == len(pool) >= 20 for pool in pools)
    words = [value.lower() for pool in pools for value in pool if not value.isdigit()]
    assert len(set(words)) == len(words)
    assert len({sort.id for sort in facts.SORTS}) == len(facts.SORTS)
    for sort in facts.SORTS:
        assert all(form.count("{}") == 1 for form in sort.others)
        assert sort.subject.startswith("my ")
