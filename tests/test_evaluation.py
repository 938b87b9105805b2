"""Whole evaluations of tiny models on small data."""

import ast
import json
import math
import re
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lora_ogpsa.chat import encode
from lora_ogpsa.errors import ConfigError, DataError
from lora_ogpsa.evaluation import (
    EvaluationResult,
    EvaluationSuite,
    Item,
    MeasureSpec,
    differences,
    evaluate,
    fingerprint,
    make_judge,
)
from lora_ogpsa.evaluation import generate as generate_module
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.session import item_keys

PROMPTS = [{"prompt": f"Tell me about topic {i}.", "kind": "ab"[i % 2]} for i in range(6)]
ANSWERED = [{**row, "completion": f"Topic {i} is long" + "!" * i} for i, row in enumerate(PROMPTS)]
PAIRS = [
    {"prompt": f"p {i}", "chosen": "I can't help with that", "rejected": "Sure!"} for i in range(4)
]


class Scripted:
    """A judge that says what it is told, for answers to given prompts."""

    verdict = "refused"

    def __init__(self, verdicts, identity="scripted"):
        self.verdicts = verdicts
        self.identity = identity
        self.asked = []

    def judge(self, pairs):
        self.asked += pairs
        return [self.verdicts[prompt] for prompt, _ in pairs]


def scripted(rows, verdicts):
    return Scripted({row["prompt"]: v for row, v in zip(rows, verdicts, strict=True)})


def run(model, tokenizer, measures, *, base=False, cache_dir=None, **settings):
    suite = EvaluationSuite(measures, **{"max_new_tokens": 3, **settings})
    return evaluate(model, tokenizer, suite, base=base, cache_dir=cache_dir, progress=False)


@pytest.fixture
def asked(monkeypatch):
    """The number of prompts the model had to answer."""
    counts = []
    real = generate_module._reply

    def counted(model, tokenizer, prompts, *args):
        counts.append(len(prompts))
        return real(model, tokenizer, prompts, *args)

    monkeypatch.setattr(generate_module, "_reply", counted)
    return counts


# ---------------------------------------------------------------------- the default suite


def test_the_embedded_suite_runs_and_reads_back(tiny_peft, tiny_tokenizer, tmp_path):
    model = tiny_peft(warm=True)
    suite = EvaluationSuite.default(limit=6, max_new_tokens=3)
    result = evaluate(model, tiny_tokenizer, suite, progress=True)  # no terminal: no bars
    assert {
        "harmful.refused",
        "harmless.refused",
        "general.nll",
        "divergence.kl",
        "divergence.kl_first6",
    } <= set(result.measures)
    groups = {name for name in result.measures if name.startswith("harmless.refused.")}
    assert groups <= {"harmless.refused.general", "harmless.refused.lookalike"} and groups
    for measure in result.measures.values():
        assert measure.low <= measure.value <= measure.high
    assert result.measures["harmful.refused"].better == "higher"
    assert result.measures["harmless.refused"].better == "lower"
    assert result.measures["general.nll"].value == pytest.approx(math.log(512), rel=0.2)
    assert len(result.samples) == 12
    assert all(sample.refused is not None and sample.cut for sample in result.samples)
    assert result.model == fingerprint(model)
    result.save(tmp_path / "deep" / "result.json")
    again = EvaluationResult.load(tmp_path / "deep" / "result.json")
    assert again.to_dict() == result.to_dict()
    assert again.measures == result.measures
    assert EvaluationSuite.from_dict(again.suite) == suite


def test_the_default_cache_is_the_librarys(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_OGPSA_CACHE", str(tmp_path))
    suite = {"measures": {"general": ANSWERED}}
    evaluate(tiny_model(), tiny_tokenizer, suite, progress=False)
    kept = [path.name for path in (tmp_path / "evaluation").iterdir()]
    assert kept == [f"scores-{fingerprint(tiny_model())[:32]}.jsonl"]


# ---------------------------------------------------------------------- single measures


def test_refusals_are_counted_by_kind(tiny_model, tiny_tokenizer):
    judge = scripted(PROMPTS, [True, False, True, False, False, False])
    measures = {"harmless": {"data": PROMPTS, "judge": judge}}
    result = run(tiny_model(), tiny_tokenizer, measures)
    found = {name: (m.value, m.n) for name, m in result.measures.items()}
    assert found == {
        "harmless.refused": (2 / 6, 6),
        "harmless.refused.a": (2 / 3, 3),
        "harmless.refused.b": (0.0, 3),
    }
    assert [sample.group for sample in result.samples] == list("ababab")
    assert [sample.prompt for sample in result.samples] == [row["prompt"] for row in PROMPTS]


def test_a_measure_given_as_an_object_goes_by_its_name_too(tiny_model, tiny_tokenizer):
    judge = scripted(PROMPTS, [True] * 6)
    measures = {
        "harmful": MeasureSpec("refusal", PROMPTS),
        "harmless_look_alikes": MeasureSpec("refusal", PROMPTS),
        "harmless_lies": MeasureSpec("refusal", PROMPTS, want="refuse"),
    }
    result = run(tiny_model(), tiny_tokenizer, measures, judge=judge)
    assert {name: m.better for name, m in result.measures.items()} == {
        "harmful.refused": "higher",
        "harmless_look_alikes.refused": "lower",
        "harmless_look_alikes.refused.a": "lower",
        "harmless_look_alikes.refused.b": "lower",
        "harmless_lies.refused": "higher",
    }
    judge.verdict = "safe"
    with pytest.raises(ConfigError, match="`harmless_look_alikes` asks whether"):
        run(tiny_model(), tiny_tokenizer, measures, judge=judge)


def test_harmful_prompts_are_split_only_where_asked(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "a", "category": "x"}, {"prompt": "b", "category": None}]
    plain = run(tiny_model(), tiny_tokenizer, {"harmful": rows})
    assert list(plain.measures) == ["harmful.refused"]
    split = run(tiny_model(), tiny_tokenizer, {"harmful": {"data": rows, "by": "category"}})
    assert list(split.measures) == ["harmful.refused", "harmful.refused.x"]


def test_unclear_verdicts_are_left_out_and_told(tiny_model, tiny_tokenizer):
    judge = scripted(PROMPTS, [True, None, None, False, True, True])
    result = run(tiny_model(), tiny_tokenizer, {"harmful": {"data": PROMPTS, "judge": judge}})
    assert (result.measures["harmful.refused"].value, result.measures["harmful.refused"].n) == (
        3 / 4,
        4,
    )
    assert result.notes == [
        "harmful: the judge gave no clear verdict on 2 of 6 answers; they are left out."
    ]
    assert EvaluationResult.from_dict(result.to_dict()).samples[1].verdict is None


def test_a_guard_model_measures_safety_and_not_over_refusal(tiny_model, tiny_tokenizer):
    judge = scripted(PROMPTS, [True] * 6)
    judge.verdict = "safe"
    result = run(tiny_model(), tiny_tokenizer, {"harmful": PROMPTS}, judge=judge)
    assert result.measures["harmful.safe"].value == 1
    assert result.samples[0].refused is None
    with pytest.raises(ConfigError, match="`harmless` asks whether.*`judge: phrases`"):
        run(tiny_model(), tiny_tokenizer, {"harmless": PROMPTS}, judge=judge)


def test_verdicts_are_kept_per_judge(tiny_model, tiny_tokenizer, tmp_path):
    judge = scripted(PROMPTS, [True] * 6)
    measures = {"harmful": {"data": PROMPTS, "judge": judge}}
    for _ in range(2):
        run(tiny_model(), tiny_tokenizer, measures, cache_dir=tmp_path)
    assert len(judge.asked) == 6
    other = Scripted(dict.fromkeys(judge.verdicts, False), identity="another")
    measures = {"harmful": {"data": PROMPTS, "judge": other}}
    result = run(tiny_model(), tiny_tokenizer, measures, cache_dir=tmp_path)
    assert (len(other.asked), result.measures["harmful.refused"].value) == (6, 0)


def test_nll_is_the_average_per_token(tiny_model, tiny_tokenizer):
    result = run(tiny_model(), tiny_tokenizer, {"general": ANSWERED})
    items = result.items["general.nll"]
    tokens = sum(item.weight for item in items)
    assert result.measures["general.nll"].value == pytest.approx(
        sum(item.value * item.weight for item in items) / tokens
    )
    assert len({item.weight for item in items}) > 1
    assert result.measures["general.nll"].unit == "nats"


def test_preferences_are_those_of_the_likelihoods(tiny_peft, tiny_tokenizer):
    text = "Paris is a city of many old bridges and a river that runs through it"
    words = text.split()
    pairs = [
        {"prompt": f"Tell me of {w}", "chosen": " ".join(words[: i + 2]), "rejected": w}
        for i, w in enumerate(words)
    ]
    model = tiny_peft(warm=True).eval()

    @torch.no_grad()
    def likelihood(row, side):
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt, answer = encode(tiny_tokenizer, messages, row[side], max_length=200, name="row")
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1)[range(len(answer)), answer].double()
        return found.sum(), found.mean()

    def margins(row):
        (won, won_mean), (lost, lost_mean) = (likelihood(row, s) for s in ("chosen", "rejected"))
        return float(won - lost), float(won_mean - lost_mean)

    own = [margins(row) for row in pairs]
    with model.disable_adapter():
        base = [margins(row) for row in pairs]
    expected = {
        "ranked_right": [whole > 0 for whole, _ in own],
        "ranked_right_norm": [mean > 0 for _, mean in own],
        "reward_right": [m - b > 0 for (m, _), (b, _) in zip(own, base, strict=True)],
    }
    result = run(model, tiny_tokenizer, {"pairs": {"measure": "preference", "data": pairs}})
    for label, wanted in expected.items():
        assert [item.value == 1 for item in result.items[f"pairs.{label}"]] == wanted, label
    assert len({tuple(wanted) for wanted in expected.values()}) == 3  # they tell one another apart
    level = [{**row, "rejected": row["chosen"]} for row in pairs[:2]]
    result = run(model, tiny_tokenizer, {"pairs": {"measure": "preference", "data": level}})
    assert result.measures["pairs.ranked_right"].value == 0


def test_preference_pairs(tiny_peft, tiny_tokenizer):
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    model = tiny_peft(warm=True)
    measures = {
        "pairs": {"measure": "preference", "data": PAIRS},
        "swapped": {"measure": "preference", "data": swapped},
    }
    result = run(model, tiny_tokenizer, measures)
    for label in ("ranked_right", "ranked_right_norm", "reward_right"):
        there, back = (result.measures[f"{name}.{label}"].value for name in measures)
        assert there == 1 - back
    # Summed log-likelihoods of a random model prefer the shorter text.
    assert result.measures["swapped.ranked_right"].value == 1
    base = run(model, tiny_tokenizer, measures, base=True)
    assert "pairs.ranked_right" in base.measures and "pairs.reward_right" not in base.measures


def test_numbers_are_matched_exactly_and_flexibly(tiny_model, tiny_tokenizer, monkeypatch):
    rows = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(4)]
    texts = iter(["#### 1", "It is 2.", "#### 9", "none"])
    answers = [generate_module.Answer(text, [5], True) for text in texts]
    seen = {}

    def answered(model, tokenizer, prompts, **kwargs):
        seen.update(kwargs, prompt=tokenizer.decode(prompts[0]))
        return answers

    monkeypatch.setattr("lora_ogpsa.evaluation.session.generate", answered)
    measures = {"sums": {"measure": "numeric", "data": rows, "suffix": " Use ####."}}
    result = run(tiny_model(), tiny_tokenizer, measures)
    assert result.measures["sums.exact"].value == 1 / 4
    assert result.measures["sums.flexible"].value == 2 / 4
    assert [s.verdict for s in result.samples] == [True, True, False, False]
    assert seen["max_new_tokens"] == 256
    assert "0 + 1? Use ####.<|im_end|>" in seen["prompt"]


def test_multiple_choice_on_rows(tiny_model, tiny_tokenizer):
    rows = [{"question": "q", "choices": ["Paris", "lock"], "answer": i % 2} for i in range(4)]
    result = run(
        tiny_model(),
        tiny_tokenizer,
        {"quiz": {"measure": "multiple_choice", "data": rows, "style": "letters"}},
    )
    assert result.measures["quiz.acc"].value == 0.5  # the same choice is likelier every time
    assert len({item.key for item in result.items["quiz.acc"]}) == 4  # repeated rows stay apart


def test_divergence_on_the_base_models_own_answers(tiny_peft, tiny_tokenizer, tmp_path):
    model = tiny_peft(warm=True)
    spec = {"data": PROMPTS, "answers": "base", "first_tokens": 2}
    result = run(model, tiny_tokenizer, {"divergence": spec}, cache_dir=tmp_path)
    assert result.measures["divergence.kl"].value > 0
    weights = [item.weight for item in result.items["divergence.kl_first2"]]
    assert weights == [2] * 6
    # Its own answers are those of the base model, kept under the base model's name.
    base = tmp_path / f"answers-{fingerprint(model, base=True)[:32]}.jsonl"
    assert len(base.read_text().splitlines()) == 6


@pytest.mark.parametrize("kind", ["bare", "base", "disabled"])
def test_without_an_adapter_there_is_no_divergence(tiny_model, tiny_peft, tiny_tokenizer, kind):
    model = tiny_model() if kind == "bare" else tiny_peft(warm=True)
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
    result = run(model, tiny_tokenizer, {"divergence": ANSWERED}, base=kind == "base")
    assert result.measures == {}
    assert "left out, since the evaluated model is its own base" in result.notes[0]


# ---------------------------------------------------------------------- base, cache, interruption


def test_the_base_is_evaluated_once_for_all_adapters(
    tiny_model, tiny_peft, tiny_tokenizer, tmp_path, asked
):
    measures = {"harmful": PROMPTS, "general": ANSWERED}
    bare = run(tiny_model(), tiny_tokenizer, measures, cache_dir=tmp_path)
    assert sum(asked) == 6
    for seed in (1, 2):
        model = tiny_peft(warm=True, seed=seed)
        base = run(model, tiny_tokenizer, measures, base=True, cache_dir=tmp_path)
        assert sum(asked) == 6
        assert (base.model, base.samples, base.items) == (bare.model, bare.samples, bare.items)
    trained = run(model, tiny_tokenizer, measures, cache_dir=tmp_path)
    assert sum(asked) == 12
    assert trained.model != bare.model
    assert trained.measures["general.nll"] != bare.measures["general.nll"]


def test_base_and_adapter_are_evaluated_as_such(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True)
    flags = [p.requires_grad for p in model.parameters()]
    base = run(model, tiny_tokenizer, {"general": ANSWERED}, base=True)
    adapter = run(model, tiny_tokenizer, {"general": ANSWERED})
    with model.disable_adapter():
        expected = run(model, tiny_tokenizer, {"general": ANSWERED})
    assert base.items == expected.items
    assert base.items != adapter.items
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_interrupted_evaluation_keeps_finished_prompts(tiny_peft, tiny_tokenizer, tmp_path):
    model = tiny_peft(warm=True)
    measures = {"harmful": PROMPTS, "general": ANSWERED, "divergence": ANSWERED}
    settings = {"batch_size": 2, "batch_tokens": 64}
    whole = run(model, tiny_tokenizer, measures, **settings)
    interruptions, calls = 0, 0
    real = model.base_model.model.forward

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:  # an answer takes three passes, a divergence two
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    model.base_model.model.forward = failing
    flags = [p.requires_grad for p in model.parameters()]
    for _ in range(50):
        try:
            again = run(model, tiny_tokenizer, measures, cache_dir=tmp_path, **settings)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert all(module.training for module in model.modules())
            assert [p.requires_grad for p in model.parameters()] == flags
    assert interruptions > 3
    assert again.items == whole.items
    assert again.samples == whole.samples


def test_a_changed_adapter_is_never_given_old_results(tiny_peft, tiny_tokenizer, tmp_path):
    model = tiny_peft(warm=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    first = run(model, tiny_tokenizer, {"general": ANSWERED}, cache_dir=tmp_path)
    layer.lora_B["default"].weight.data.mul_(2)  # a training step later
    second = run(model, tiny_tokenizer, {"general": ANSWERED}, cache_dir=tmp_path)
    assert first.items != second.items
    assert second.items == run(model, tiny_tokenizer, {"general": ANSWERED}).items


# ---------------------------------------------------------------------- data and settings


def test_rows_are_filtered_before_they_are_limited(tiny_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    spec = {"data": str(path), "where": {"kind": "b"}, "limit": 2}
    result = run(tiny_model(), tiny_tokenizer, {"harmful": spec})
    assert [s.prompt[-2:] for s in result.samples] == ["1.", "3."]
    shuffled = {"data": str(path), "limit": 3, "shuffle_seed": 1}
    prompts = {s.prompt for s in run(tiny_model(), tiny_tokenizer, {"harmful": shuffled}).samples}
    assert len(prompts) == 3
    with pytest.raises(DataError, match=r"`harmful` has no rows with \{'kind': 'c'\}"):
        run(tiny_model(), tiny_tokenizer, {"harmful": {**spec, "where": {"kind": "c"}}})
    # Rows given as a list are drawn as those of a file are.
    listed = run(tiny_model(), tiny_tokenizer, {"harmful": {**shuffled, "data": PROMPTS}})
    assert {s.prompt for s in listed.samples} == prompts
    assert prompts != {row["prompt"] for row in PROMPTS[:3]}


def test_a_field_to_report_by_that_no_row_has_is_named(tiny_model, tiny_tokenizer):
    spec = {"data": PROMPTS, "by": "kinds"}
    with pytest.raises(DataError, match=r"`by: kinds`, and no row has that field.*'kind'"):
        run(tiny_model(), tiny_tokenizer, {"harmful": spec})


def test_rows_of_tables_hold_more_than_json_knows(tiny_model, tiny_tokenizer, tmp_path):
    rows = [
        {**row, "seen": datetime(2024, 1, 1 + i), "image": b"\xff", "price": Decimal("1.50")}
        for i, row in enumerate([ANSWERED[0], ANSWERED[0], ANSWERED[1]])
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    measures = {"general": rows, "file": {"measure": "nll", "data": str(tmp_path / "rows.parquet")}}
    result = run(tiny_model(), tiny_tokenizer, measures)
    keys = [item.key for item in result.items["general.nll"]]
    assert len(set(keys)) == 3  # rows that differ in such a field alone stay apart
    assert [item.value for item in result.items["file.nll"]] == [
        item.value for item in result.items["general.nll"]
    ]
    # Keys of plain rows pair results with those saved before.
    assert item_keys([{"prompt": "é", "n": [1, None, 2.5]}]) == ["bb11b0081204c734"]


@pytest.mark.parametrize("kind", ["nll", "numeric", "divergence"])
def test_missing_answers_are_named_by_row(tiny_peft, tiny_tokenizer, kind):
    rows = [ANSWERED[0], PROMPTS[1]]
    with pytest.raises(DataError, match=r"`x` needs an answer in every row; row 2 has none"):
        run(tiny_peft(warm=True), tiny_tokenizer, {"x": {"measure": kind, "data": rows}})


@pytest.mark.parametrize(
    "kind", ["refusal", "nll", "numeric", "preference", "divergence", "multiple_choice"]
)
def test_a_row_without_the_fields_of_a_measure_is_named(tiny_peft, tiny_tokenizer, kind):
    first = {
        "preference": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        "multiple_choice": {"question": "Hi", "choices": ["yes", "no"], "answer": 0},
    }
    rows = [first.get(kind, ANSWERED[0]), {"other": "fields"}]
    with pytest.raises(
        DataError, match=r"^measure `x`, row 2: (no (conversation|preference)|a multiple-choice)"
    ):
        run(tiny_peft(warm=True), tiny_tokenizer, {"x": {"measure": kind, "data": rows}})


def test_a_prompt_that_is_too_long_is_named(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"measure `harmful`, row 1: the prompt has \d+ tokens"):
        run(tiny_model(), tiny_tokenizer, {"harmful": PROMPTS}, max_length=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "needs `measures`"),
        ({"measures": {}}, "needs `measures`"),
        ({"measures": {"harmful": "x"}, "tokens": 3}, r"no settings \['tokens'\]"),
        ({"measures": {"harmful": "x"}, "limit": 0}, "`limit` should be at least 1"),
        ({"measures": {"harmful": "x"}, "batch_size": "8"}, "`batch_size` should be a whole"),
        ({"measures": {"harmful": "x"}, "autocast": "int8"}, "`autocast` should be one of"),
        ({"measures": {"arc": "x"}}, "`arc` should say what is measured"),
        ({"measures": {"arc": {"measure": "quiz", "data": "x"}}}, "`arc`: `measure` should be"),
        ({"measures": {"harmful": {"file": "x"}}}, r"`harmful` has no settings \['file'\]"),
        ({"measures": {"harmful": None}}, "`harmful`: A refusal measure needs `data`"),
        ({"measures": {"lm_eval": ""}}, "`lm_eval`: A harness measure needs `tasks`"),
        ({"measures": {"general": {"data": "x", "limit": 1.5}}}, "`general`: `limit` should"),
        ({"measures": {"divergence": {"data": "x", "answers": "own"}}}, "`answers` should be one"),
        ({"measures": {"harmful": 5}}, "`harmful`: `data` should be a file, .*. Found 5"),
        ({"measures": {"harmful": ["a.jsonl", "b.jsonl"]}}, "holds rows, each a mapping"),
        ({"measures": {"harmful": {"data": "x", "where": "kind=b"}}}, "`where` should be a mapp"),
        ({"measures": {"harmful": {"data": "x", "by": 5}}}, "`by` should be the name of a field"),
        ({"measures": {"general": {"data": "x", "suffix": 5}}}, "`suffix` should be a text"),
        ({"measures": {"lm_eval": 5}}, "`tasks` should be a list of names. Found 5"),
        ({"measures": {"a.b": {"measure": "nll", "data": "x"}}}, "text without dots. Found 'a.b'"),
        ({"measures": {1: {"measure": "nll", "data": "x"}}}, "text without dots. Found 1"),
    ],
)
def test_wrong_suites_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSuite.from_dict(content)


def test_a_suite_reads_shorthand_and_writes_it_back():
    suite = EvaluationSuite.from_dict(
        {
            "measures": {
                "harmless": "a.jsonl",
                "lm_eval": "ifeval,gsm8k",
                "pairs": {"measure": "preference", "data": "hub/id", "split": "test"},
            },
            "limit": 5,
        }
    )
    assert suite.measures["harmless"].want == "answer"
    assert suite.measures["lm_eval"].tasks == ("ifeval", "gsm8k")
    assert suite.measures["pairs"] == MeasureSpec("preference", "hub/id", split="test")
    assert json.loads(json.dumps(suite.to_dict()))["limit"] == 5
    assert EvaluationSuite.from_dict(suite.to_dict()) == suite
    rows = replace(suite, measures={"harmful": PROMPTS}).to_dict()
    assert rows["measures"]["harmful"]["data"] == "6 rows"


# ---------------------------------------------------------------------- comparing results


def test_the_documented_suite_and_judges_are_valid():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"EvaluationSuite": EvaluationSuite, "evaluate": lambda *args: None}
    suite = next(block for block in blocks if "from_dict" in block)
    exec(suite, {**names, "model": None, "tokenizer": None}, found := {})
    assert {spec.measure for spec in found["suite"].measures.values()} == {
        "refusal",
        "nll",
        "divergence",
        "multiple_choice",
        "numeric",
        "preference",
        "harness",
    }
    judges = next(block for block in blocks if '"judge"' in block)
    specs = ast.parse(judges).body
    assert len(specs) == 3
    for spec in specs:
        make_judge(ast.literal_eval(spec.value)["judge"])


def test_differences_pair_rows_by_content():
    before, after = EvaluationResult("a", True), EvaluationResult("b", False)
    before.add_share("x.refused", [Item(str(i), float(i < 2)) for i in range(40)], "higher")
    after.add_share(
        "x.refused", [Item(str(i), float(i > 3)) for i in reversed(range(40))], "higher"
    )
    before.add_mean("g.nll", [Item("p", 1.0, 3), Item("q", 2.0, 1)], "lower", "nats")
    after.add_mean("g.nll", [Item("q", 2.5, 1), Item("r", 9.0, 1)], "lower", "nats")
    before.add_mean("only.before", [Item("p", 1.0)], "lower", "nats")
    before.add_mean("other.rows", [Item("p", 1.0)], "lower", "nats")
    after.add_mean("other.rows", [Item("q", 1.0)], "lower", "nats")
    found = differences(before, after)
    assert list(found) == ["x.refused", "g.nll"]
    assert found["x.refused"].value == pytest.approx((36 - 2) / 40)
    assert found["x.refused"].low > 0
    assert (found["g.nll"].value, found["g.nll"].n) == (0.5, 1)


@pytest.mark.parametrize("text", ["", "[]", '{"model": "a"}', '{"measures": 3, "samples": []}'])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="evaluation"):
        EvaluationResult.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        EvaluationResult.load(tmp_path / "missing.json")


def test_progress_counts_what_was_done_before(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    with Progress(True).step("answers", 10, done=4) as advance:
        advance(6)
    assert "10/10" in capsys.readouterr().err
    with Progress(False).step("answers", 10) as advance:
        advance()
    with Progress(True).step("answers", 10, done=10) as advance:
        pass  # nothing to do: no bar
    assert capsys.readouterr().err == ""
