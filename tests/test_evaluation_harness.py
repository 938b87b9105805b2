"""The optional lm-evaluation-harness, offline, on a task file of our own."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora_ogpsa.errors import ConfigError, ModelError
from lora_ogpsa.evaluation import EvaluationSuite, evaluate
from lora_ogpsa.evaluation.exact import gold_number, last_number, strict_number
from lora_ogpsa.evaluation.harness import run_harness

ROWS = [
    {"question": "Where is Paris?", "choices": ["France", "a computer"], "answer": 0},
    {"question": "Who explored the world?", "choices": ["lock", "the brave rabbit"], "answer": 1},
    {"question": "What stores numbers?", "choices": ["story", "a computer", "Paris"], "answer": 1},
    {"question": "What can I pick?", "choices": ["a lock", "binary"], "answer": 0},
    {"question": "Write what?", "choices": ["a short story", "one"], "answer": 0},
    {"question": "Explain how?", "choices": ["step", "step by step"], "answer": 1},
]


def test_a_missing_harness_is_explained(monkeypatch, tiny_model, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModelError, match=r"tasks \['ifeval'\].*pip install lm-eval"):
        run_harness(tiny_model(), tiny_tokenizer, ["ifeval"])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the optional extra `eval` is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "quiz.yaml").write_text(
        f"""task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return folder, data


def test_its_numbers_are_ours_on_the_same_rows(tasks, tiny_peft, tiny_tokenizer, tmp_path):
    folder, data = tasks
    model = tiny_peft(warm=True)
    suite = EvaluationSuite(
        {
            "ours": {"measure": "multiple_choice", "data": str(data)},
            "lm_eval": {"tasks": "quiz", "include_path": str(folder)},
        },
        batch_size=3,
    )
    results = [
        evaluate(model, tiny_tokenizer, suite, base=base, cache_dir=tmp_path / "kept")
        for base in (False, True)
    ]
    for result in results:
        for metric in ("acc", "acc_norm"):
            assert result.measures[f"ours.{metric}"] == result.measures[f"lm_eval.quiz.{metric}"]
            ours = [item.value for item in result.items[f"ours.{metric}"]]
            theirs = [item.value for item in result.items[f"lm_eval.quiz.{metric}"]]
            assert ours == theirs
    # Responses of adapter and base went into files of their own.
    assert len(list((tmp_path / "kept").glob("harness-*.db"))) == 2


def test_base_and_adapter_are_told_apart_and_nothing_is_left_behind(
    tasks, tiny_peft, tiny_tokenizer, monkeypatch
):
    folder, _ = tasks
    model = tiny_peft(warm=True, lora_dropout=0.5)
    tiny_tokenizer.padding_side = "right"
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    seen = []
    from lm_eval.models.huggingface import HFLM

    real = HFLM._model_call

    def watched(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        seen.append(float(out.double().sum()))
        return out

    monkeypatch.setattr(HFLM, "_model_call", watched)
    for base in (False, True):
        run_harness(model, tiny_tokenizer, ["quiz"], include_path=folder, base=base, batch_size=64)
    assert len(seen) == 2 and seen[0] != seen[1]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert tiny_tokenizer.padding_side == "right"
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == states


def test_finished_responses_are_kept(tasks, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    folder, _ = tasks
    settings = {"include_path": folder, "cache": tmp_path / "kept"}
    first = run_harness(tiny_model(), tiny_tokenizer, ["quiz"], **settings)
    from lm_eval.models.huggingface import HFLM

    def never(*args, **kwargs):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(HFLM, "_model_call", never)
    assert run_harness(tiny_model(), tiny_tokenizer, ["quiz"], **settings) == first
    with pytest.raises(AssertionError, match="asked again"):
        run_harness(tiny_model(seed=1), tiny_tokenizer, ["quiz"], **settings)


@given(st.text("0123456789.,-$#. \nab", max_size=30), st.sampled_from(["7", "1,234", "-5", "0.5"]))
@example("#### 18.", "18")
@example("so $1,234.", "1,234")
def test_numbers_are_matched_as_it_matches_them(text, gold):
    pytest.importorskip("lm_eval", reason="the optional extra `eval` is not installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    answer = f"some steps\n#### {gold}"
    strict = RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    for pattern, ours in ((strict, strict_number), (flexible, last_number)):
        extracted = pattern.apply([[text]], [{}])[0][0]
        theirs = exact_match_hf_evaluate(
            predictions=[extracted],
            references=[answer],
            regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"],
            ignore_case=True,
        )["exact_match"]
        assert (ours(text) == gold_number(answer)) == bool(theirs)


@pytest.mark.slow  # the harness reads all of its own task files to be sure
def test_an_unknown_task_is_named(tasks, tiny_model, tiny_tokenizer):
    folder, _ = tasks
    with pytest.raises(ConfigError, match=r"knows no tasks \['no_such_task'\]"):
        run_harness(tiny_model(), tiny_tokenizer, ["quiz", "no_such_task"], include_path=folder)
