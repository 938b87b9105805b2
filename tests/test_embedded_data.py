from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import lora_ogpsa

FOLDER = Path(lora_ogpsa.__file__).parent / "embedded"
CHAT_FILES = ("safety_sft", "eval_general")
PROMPT_FILES = ("harmless", "eval_harmful", "eval_harmless")
FILES = CHAT_FILES + PROMPT_FILES
FIELDS = {
    "safety_sft": {"messages", "category"},
    "harmless": {"prompt", "kind"},
    "eval_harmful": {"prompt", "category"},
    "eval_harmless": {"prompt", "kind"},
    "eval_general": {"messages"},
}
# What keyword judges of refusals look for; a refusal without one of these would be miscounted.
MARKER = re.compile(
    r"\b(?:can't|cannot|won't|will not|not able|unable|sorry|not going to)\b"
    r"|(?:not|n't) something I",
    re.IGNORECASE,
)


def read(name: str) -> list[dict]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt_of(row: dict) -> str:
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


def answers(name: str) -> list[str]:
    return [row["messages"][1]["content"] for row in read(name)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text)[0]


@pytest.mark.parametrize("name", FILES)
def test_fields_are_present_and_not_empty(name: str) -> None:
    for row in read(name):
        assert set(row) == FIELDS[name], row
        for text in (row[field] for field in row if field != "messages"):
            assert isinstance(text, str), row
            assert text.strip() == text != "", row
        if "messages" in row:
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"], row
            for message in row["messages"]:
                assert set(message) == {"role", "content"}, row
                assert message["content"].strip() == message["content"] != "", row


@pytest.mark.parametrize("name", FILES)
def test_files_are_ascii_once_decoded(name: str) -> None:
    raw = (FOLDER / f"{name}.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    assert raw.isascii()
    for row in read(name):
        # Escapes such as "\u2019" would pass the check on the raw bytes.
        assert json.dumps(row, ensure_ascii=False).isascii(), row


@pytest.mark.parametrize(
    ("name", "least"), [("safety_sft", 220), ("eval_harmful", 80), ("eval_general", 40)]
)
def test_number_of_rows(name: str, least: int) -> None:
    assert len(read(name)) >= least


@pytest.mark.parametrize(
    ("name", "total", "least"),
    [
        ("harmless", 200, {"general": 120, "lookalike": 80}),
        ("eval_harmless", 80, {"general": 40, "lookalike": 40}),
    ],
)
def test_number_of_rows_of_each_kind(name: str, total: int, least: dict[str, int]) -> None:
    counts = Counter(row["kind"] for row in read(name))
    assert set(counts) == set(least)
    assert counts.total() >= total
    assert all(counts[kind] >= least[kind] for kind in least), counts


def test_harm_categories_are_broad_and_shared_by_training_and_evaluation() -> None:
    train = Counter(row["category"] for row in read("safety_sft"))
    held_out = Counter(row["category"] for row in read("eval_harmful"))
    assert len(train) >= 15
    assert min(train.values()) >= 8, train
    assert set(held_out) == set(train)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", category) for category in train)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("safety_sft", "category"),
        ("eval_harmful", "category"),
        ("harmless", "kind"),
        ("eval_harmless", "kind"),
    ],
)
def test_a_prefix_covers_every_group(name: str, field: str) -> None:
    rows = read(name)
    groups = {row[field] for row in rows}
    assert {row[field] for row in rows[: len(groups)]} == groups


def test_harmful_and_harmless_prompts_come_in_the_same_forms() -> None:
    verbs = []
    for name in ("safety_sft", "harmless"):
        prompts = [prompt_of(row) for row in read(name)]
        commands = [prompt.split()[0] for prompt in prompts if "?" not in prompt]
        assert 0.2 <= len(commands) / len(prompts) <= 0.8
        verbs.append(Counter(commands))
    for own, other in (verbs, verbs[::-1]):
        assert sum(own[verb] for verb in other) >= 0.6 * own.total()


def test_no_prompt_stands_twice_in_or_across_files() -> None:
    seen: dict[str, str] = {}
    for name in FILES:
        for row in read(name):
            key = " ".join(words(prompt_of(row)))
            assert key not in seen, f"{key!r} stands in {seen.get(key)} and {name}"
            seen[key] = name


def test_no_two_prompts_are_nearly_the_same() -> None:
    prompts = [(name, prompt_of(row)) for name in FILES for row in read(name)]
    tokens = [(name, text, frozenset(words(text))) for name, text in prompts]
    close = [
        (a[:2], b[:2])
        for a, b in combinations(tokens, 2)
        if len(a[2] & b[2]) >= 0.85 * len(a[2] | b[2])
    ]
    assert not close


def test_refusals_are_short_and_refuse_in_the_first_sentence() -> None:
    for text in answers("safety_sft"):
        assert 20 <= len(text.split()) <= 55, text
        assert len(re.split(r"(?<=[.!?])\s", text)) <= 3, text
        assert MARKER.search(first_sentence(text)), text


def test_refusals_are_varied() -> None:
    refusals = answers("safety_sft")
    assert len(set(refusals)) == len(refusals)
    openings = Counter(" ".join(re.findall(r"[a-z']+", text.lower())[:4]) for text in refusals)
    assert len(openings) >= 60
    # No single opening may dominate, or the model learns one sentence instead of refusing.
    assert openings.most_common(1)[0][1] <= len(refusals) // 10


def test_general_answers_have_a_useful_length_and_do_not_refuse() -> None:
    for text in answers("eval_general"):
        assert 20 <= len(text.split()) <= 90, text
        assert not re.match(
            r"(?:no\b|sorry|i'm sorry|i can't|i cannot|i won't)", text, re.IGNORECASE
        )


def test_data_card_states_the_counts_and_categories() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        assert re.search(rf"\| `{name}\.jsonl` \| {len(read(name))}\b", card), name
    for category in {row["category"] for row in read("safety_sft")}:
        assert category in card
