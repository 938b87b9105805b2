from __future__ import annotations

import csv
import json

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ogpsa.chat import as_messages, as_preference, collate, encode
from lora_ogpsa.data import load_rows
from lora_ogpsa.errors import DataError

ROWS = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(6)]
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------- reading


def test_every_file_type_gives_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    write(tmp_path / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "list.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "lines.json", jsonl(ROWS))
    write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).encode() + b"\r\n\r\n")
    for path in tmp_path.iterdir():
        assert load_rows(path) == load_rows(str(path)) == ROWS, path.name


def test_json_strings_may_hold_unicode_line_separators(tmp_path):
    rows = [{"prompt": "one\u2028two\u0085three"}]
    path = write(tmp_path / "a.jsonl", json.dumps(rows[0], ensure_ascii=False))
    assert load_rows(path) == rows


def test_csv_cells_may_hold_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,answer\n"two\nlines","a, b"\n')
    assert load_rows(path) == [{"prompt": "two\nlines", "answer": "a, b"}]


def test_csv_cells_may_be_long(tmp_path):
    usual = csv.field_size_limit()
    (row,) = load_rows(write(tmp_path / "a.csv", f"prompt\n{'x' * 200_000}\n"))
    assert len(row["prompt"]) == 200_000
    assert csv.field_size_limit() == usual


def test_limit_and_shuffle(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    assert load_rows(path, limit=2) == ROWS[:2]
    assert load_rows(path, limit=100) == ROWS
    shuffled = load_rows(path, shuffle_seed=1)
    assert shuffled != ROWS
    assert sorted(shuffled, key=str) == ROWS
    assert load_rows(path, shuffle_seed=1, limit=3) == shuffled[:3]
    assert load_rows(path, shuffle_seed=2) != shuffled
    with pytest.raises(DataError, match="limit must be at least 1, found 0"):
        load_rows(path, limit=0)


def test_folder_of_files(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(ROWS[:4]))
    write(tmp_path / "test.jsonl", jsonl(ROWS[4:]))
    assert load_rows(tmp_path) == ROWS[:4]
    assert load_rows(str(tmp_path), split="test") == ROWS[4:]
    with pytest.raises(DataError, match=r"not a readable data-set folder: .*nosuch"):
        load_rows(tmp_path, split="nosuch")


def test_saved_data_sets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one", limit=2, shuffle_seed=0) == load_rows(
        tmp_path / "two", limit=2, shuffle_seed=0
    )
    assert load_rows(tmp_path / "two", split="test") == ROWS[:1]
    with pytest.raises(DataError, match="without splits"):
        load_rows(tmp_path / "one", split="train")
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        load_rows(tmp_path / "two", split="dev")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', r"a\.jsonl, line 2: found list, expected an object"),
        ("a.json", '[{"prompt": "x"},\n oops]', r"a\.json, line 2: not valid JSON"),
        ("a.json", '[{"prompt": "x"}, 3]', r"a\.json, item 2: found int, expected an object"),
        ("a.json", '{\n"prompt": "x"}', r"a\.json, line 1: .* or one list of objects"),
        ("a.jsonl", "\n\n", r"a\.jsonl: the data set has no rows"),
        ("a.json", "[]", r"a\.json: the data set has no rows"),
        ("a.csv", "prompt,answer\n", r"a\.csv: the data set has no rows"),
        ("a.csv", "a,b\n1,2\n1\n", r"a\.csv, line 3: .* header's 2 \(a, b\)"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: .* header's 2 \(a, b\)"),
        ("a.csv", 'a,b\n"x"y,2\n', r"a\.csv, after line 1: not valid CSV"),
        ("a.csv", "a,b,a,b\n1,2,3,4\n", r"a\.csv: the header names 'a', 'b' more than once"),
        ("a.json", "[" * 100_000, r"a\.json: nested too deeply"),
        ("a.jsonl", '{}\n{"a":' + "[" * 100_000, r"a\.jsonl, line 2: nested too deeply"),
        ("a.jsonl", b"\xff\xfe{}", r"a\.jsonl: cannot be read as UTF-8 text"),
        ("a.parquet", "no", r"a\.parquet: not a readable parquet file"),
        ("a.txt", "hello", r"a\.txt: unknown file type '\.txt'; accepted are \.jsonl"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, file, text, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / file, text))
    assert "\n" not in str(caught.value)


def test_files_have_no_split(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    with pytest.raises(DataError, match="a file has no config or split"):
        load_rows(path, split="train")


@pytest.mark.parametrize(
    "source", ["no.jsonl", "data/no.csv", "./no", "/no/such", "~/no/such", "a/b/c"]
)
def test_missing_paths_do_not_go_to_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"^file not found: {source};"):
        load_rows(source)


def test_missing_path_objects_are_files(tmp_path):
    with pytest.raises(DataError, match="^file not found"):
        load_rows(tmp_path / "nosuch")


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no-such-org/no-data: no local file .* hub") as caught:
        load_rows("no-such-org/no-data", split="test")
    assert "\n" not in str(caught.value)
    assert "split='test'" in str(caught.value)


def test_unknown_embedded_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"^embedded:nosuch: .*; there are: ") as caught:
        load_rows("embedded:nosuch")
    listed = str(caught.value).split("there are: ")[1]
    for name in [] if listed == "none" else listed.split(", "):
        assert load_rows(f"embedded:{name}", limit=1)


def test_embedded_name_cannot_leave_its_folder():
    with pytest.raises(DataError, match="no such embedded data set"):
        load_rows("embedded:../embedded/safety_sft")


# ----------------------------------------------------------------------------------- rows as chat


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, BOT]}, ([USER], "Hello")),
        ({"messages": [USER]}, ([USER], None)),
        ({"messages": [SYSTEM, USER, BOT, USER, BOT]}, ([SYSTEM, USER, BOT, USER], "Hello")),
        ({"messages": [SYSTEM, USER, BOT, USER]}, ([SYSTEM, USER, BOT, USER], None)),
        (
            {"messages": [USER, CALL, TOOL, BOT]},
            ([USER, {**CALL, "content": ""}, TOOL], "Hello"),
        ),
        ({"messages": [USER, {**BOT, "tool_calls": None}]}, ([USER], "Hello")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, BOT]},
            ([USER], "Hello"),
        ),
        ({"prompt": "Hi"}, ([USER], None)),
        ({"prompt": "Hi", "completion": "Hello"}, ([USER], "Hello")),
        ({"prompt": "Hi", "completion": [BOT]}, ([USER], "Hello")),
        ({"prompt": [SYSTEM, USER], "response": "Hello"}, ([SYSTEM, USER], "Hello")),
        ({"prompt": "Hi", "answer": None}, ([USER], None)),
        ({"prompt": "Hi", "answer": "  "}, ([USER], None)),
        ({"prompt": [USER, BOT]}, ([USER], "Hello")),
        ({"question": "Hi", "answer": "Hello"}, ([USER], "Hello")),
        ({"instruction": "Hi", "output": "Hello", "input": ""}, ([USER], "Hello")),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            ([{"role": "user", "content": "Add.\n\n1 2"}], "3"),
        ),
        ({"prompt": "other", "messages": [USER, BOT]}, ([USER], "Hello")),
        ({"prompt": "Hi", "messages": None}, ([USER], None)),
        ({"system": "Be brief.", "prompt": "Hi", "response": "Hello"}, ([SYSTEM, USER], "Hello")),
        ({"system": "Be brief.", "messages": [USER, BOT]}, ([SYSTEM, USER], "Hello")),
        ({"system": "Be long.", "messages": [SYSTEM, USER, BOT]}, ([SYSTEM, USER], "Hello")),
        (
            {"system": "Be brief.", "messages": [{"role": "system", "content": ""}, USER, BOT]},
            ([SYSTEM, USER], "Hello"),
        ),
        ({"system": " ", "prompt": "Hi"}, ([USER], None)),
        ({"system": None, "prompt": "Hi"}, ([USER], None)),
    ],
)
def test_as_messages(row, expected):
    before = json.dumps(row)
    assert as_messages(row) == expected
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 1}, r"row 7: .* the fields are `text`, `id`; accepted are `messages`"),
        ({}, "the fields are none"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "[]x"}, None),
        ({"messages": [BOT]}, "no user turn with text to answer; the turns are assistant"),
        ({"prompt": " "}, "no user turn with text"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"turn 1: .* found `from`, `value`"),
        ({"messages": ["x"]}, "turn 1: .* found str"),
        ({"messages": [USER, CALL]}, "a tool call; an answer must be text"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1` must be text, found NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text"),
        ({"system": 3, "prompt": "Hi"}, "`system` must be text, found int"),
        ({"tools": "[add", "prompt": "Hi"}, "`tools` is a text but no JSON: Expecting value"),
        ({"tools": ["add"], "prompt": "Hi"}, "`tools` must be a list of objects, found ..add"),
        (
            {"messages": json.dumps([USER])},
            "row 7: `messages` holds messages written out as a text",
        ),
        ({"prompt": str([USER])}, "`prompt` holds messages written out as a text"),
        ({"question": "1 + 1?", "answer": 2}, "`answer` must be text or a list of messages"),
        ({"prompt": "a \ud83d"}, r"row 7: `prompt` holds half a character \('\\ud83d'\)"),
        ({"messages": [{"role": "user", "content": "\ude00"}]}, "turn 1` holds half a character"),
    ],
)
def test_as_messages_refuses(row, message):
    if message is None:  # a text is a user turn under any prompt-like field
        assert as_messages(row) == ([{"role": "user", "content": "[]x"}], None)
        return
    with pytest.raises(DataError, match=message):
        as_messages(row, name="row 7")


def bot(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [bot("good")], "rejected": [bot("bad")]},
        {"prompt": [USER], "chosen": "good", "rejected": [bot("bad")]},
        {"chosen": [USER, bot("good")], "rejected": [USER, bot("bad")]},
        {"prompt": "Hi", "chosen": [USER, bot("good")], "rejected": [USER, bot("bad")]},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: good",
            "rejected": "\n\nHuman: Hi\n\nAssistant: bad",
        },
    ],
)
def test_as_preference(row):
    assert as_preference(row) == ([USER], "good", "bad")


def test_as_preference_keeps_earlier_turns():
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant: good"
    prompt, *answers = as_preference({"chosen": chosen, "rejected": chosen[:-4] + "bad"})
    assert prompt == [USER, BOT, USER]
    assert answers == ["good", "bad"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"chosen": [USER, bot("Hello")], "rejected": [USER, bot("Go away")]},
        {"chosen": "Hi Hello", "rejected": "Hi Go away"},
    ],
)
def test_as_preference_takes_a_system_column(row):
    expected = [SYSTEM, USER], "Hello", "Go away"
    assert as_preference({"system": "Be brief.", **row}) == expected


def test_as_preference_of_plain_texts_agrees_with_trl():
    from trl import extract_prompt

    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    theirs = extract_prompt(row)
    prompt, chosen, rejected = as_preference(row)
    assert prompt == [{"role": "user", "content": theirs["prompt"].strip()}]
    assert (chosen, rejected) == (theirs["chosen"].strip(), theirs["rejected"].strip())


def test_as_preference_of_plain_texts_cuts_between_words():
    row = {"chosen": "The sky is blue today.", "rejected": "The sky is bluish grey."}
    assert as_preference(row) == (
        [{"role": "user", "content": "The sky is"}],
        "blue today.",
        "bluish grey.",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "x"}, "the fields are `prompt`, `chosen`; accepted are"),
        ({"chosen": "abc", "rejected": "xyz"}, "share no beginning"),
        ({"chosen": "same text", "rejected": "same"}, "share no beginning"),
        ({"chosen": "a b", "rejected": "a \ud83d"}, "`rejected` holds half a character"),
        ({"chosen": [BOT], "rejected": [BOT]}, "there is no `prompt`"),
        ({"chosen": [USER, BOT], "rejected": [SYSTEM, USER, BOT]}, r"\(2 turns\).*\(3 turns\)"),
        ({"prompt": "Hi", "chosen": " ", "rejected": "x"}, "must end with an assistant's answer"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": [BOT]}, "must end with an assistant's"),
    ],
)
def test_as_preference_refuses(row, message):
    with pytest.raises(DataError, match=message):
        as_preference(row)


# --------------------------------------------------------------------------------- rows as tokens


def test_encode_is_the_template_up_to_end_of_turn(tiny_tokenizer):
    prompt, answer = encode(tiny_tokenizer, [SYSTEM, USER], "The end.", max_length=256)
    assert tiny_tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tiny_tokenizer.decode(answer) == "The end.<|im_end|>"
    whole = tiny_tokenizer.apply_chat_template(
        [SYSTEM, USER, bot("The end.")], tokenize=True, return_dict=False
    )
    assert whole[: len(prompt + answer)] == prompt + answer


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1), room=st.integers(1, 30))
def test_encode_cuts_answers_only(tiny_tokenizer, text, room):
    prompt, none = encode(tiny_tokenizer, [USER], None, max_length=4096)
    assert none == []
    _, whole = encode(tiny_tokenizer, [USER], text, max_length=100_000)
    assert tiny_tokenizer.decode(whole) == text + "<|im_end|>"
    again, cut = encode(tiny_tokenizer, [USER], text, max_length=len(prompt) + room)
    assert again == prompt
    assert cut == whole[:room]


def test_encode_refuses_a_prompt_without_room(tiny_tokenizer):
    prompt, _ = encode(tiny_tokenizer, [USER], None, max_length=256)
    size = len(prompt)
    with pytest.raises(DataError, match=f"^row 3: the prompt has {size} tokens and max_length is"):
        encode(tiny_tokenizer, [USER], "Hello", max_length=size, name="row 3")


@pytest.fixture
def with_template(tiny_tokenizer):
    """A copy of the tokenizer with another chat template."""
    import copy

    def build(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return build


def test_encode_without_template_is_plain_text(with_template):
    tokenizer = with_template(None)
    prompt, answer = encode(tokenizer, [USER], "Hello", max_length=64)
    assert tokenizer.decode(prompt) == "Hi\n\n"
    assert tokenizer.decode(answer) == "Hello<|im_end|>"


def test_encode_where_a_token_straddles_prompt_and_answer(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }} A: What is th"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    whole = tokenizer("Q: Hi A: What is the capital</s>").input_ids
    prompt, answer = encode(tokenizer, [USER], "e capital", max_length=64)
    assert whole[: len(prompt)] != prompt  # the case is real
    assert tokenizer.decode(prompt) == "Q: Hi A: What is th"
    assert tokenizer.decode(answer) == "e capital</s>"


def test_encode_where_the_template_rewrites_the_prompt(with_template):
    tokenizer = with_template(
        "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    prompt, answer = encode(tokenizer, [USER], "Hello", max_length=64)
    assert tokenizer.decode(prompt) == "1Hi"
    assert tokenizer.decode(answer) == "Hello<|im_end|>"


# As Qwen3's: the last answer has a block of thoughts, and a prompt an open one unless told not to.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


def test_encode_tells_a_thinking_model_not_to(with_template):
    tokenizer = with_template(THINKING)
    prompt, none = encode(tokenizer, [USER], None, max_length=256)
    assert none == []
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(prompt) == text
    again, answer = encode(tokenizer, [USER], "Hello.", max_length=256)
    assert again == prompt
    assert tokenizer.decode(answer) == "Hello.<|im_end|>"
    row = [USER, bot("Hello.")]  # as it is rendered in training
    whole = tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)
    assert whole[: len(prompt + answer)] == prompt + answer


def test_encode_reports_a_template_that_refuses_a_role(with_template):
    tokenizer = with_template("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"row: .* \(system, user\): System role not supported"):
        encode(tokenizer, [SYSTEM, USER], "x", max_length=64)


def test_collate_pads_and_masks():
    examples = [([5, 6, 7], [8, 2]), ([5], [9]), ([4, 4], [])]
    right = collate(examples, pad_id=0)
    assert right["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 9, 0, 0, 0], [4, 4, 0, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert right["labels"].tolist() == [
        [-100, -100, -100, 8, 2],
        [-100, 9, -100, -100, -100],
        [-100] * 5,
    ]
    left = collate(examples, pad_id=0, side="left")
    assert left["input_ids"].tolist() == [[5, 6, 7, 8, 2], [0, 0, 0, 5, 9], [0, 0, 0, 4, 4]]
    assert left["labels"].tolist() == [
        [-100, -100, -100, 8, 2],
        [-100, -100, -100, -100, 9],
        [-100] * 5,
    ]
    assert all(tensor.dtype == torch.int64 for tensor in (*right.values(), *left.values()))


@settings(max_examples=30, deadline=None)
@given(
    examples=st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9))), min_size=1
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_collate_loses_nothing(examples, side):
    batch = collate(examples, pad_id=0, side=side)
    for i, (prompt, answer) in enumerate(examples):
        mask = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][mask].tolist() == prompt + answer
        assert batch["labels"][i][mask].tolist() == [-100] * len(prompt) + answer
        assert (batch["labels"][i][~mask] == -100).all()


def test_collate_loss_is_the_answers_own(tiny_model, tiny_tokenizer):
    """The loss of a padded batch equals the token-weighted loss of its rows alone."""
    model = tiny_model()
    pairs = [
        encode(tiny_tokenizer, [USER], text, max_length=128)
        for text in ("The capital of France is Paris.", "No.")
    ]
    with torch.no_grad():
        together = model(**collate(pairs, pad_id=2)).loss
        alone = [model(**collate([pair], pad_id=2)).loss * len(pair[1]) for pair in pairs]
    expected = sum(alone) / sum(len(answer) for _, answer in pairs)
    torch.testing.assert_close(together, expected)


def test_collate_refuses():
    with pytest.raises(DataError, match="no examples"):
        collate([], pad_id=0)
    with pytest.raises(DataError, match="side must be"):
        collate([([1], [2])], pad_id=0, side="middle")
