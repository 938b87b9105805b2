"""Reference objectives: their rows, their losses, and the base model's own answers."""

import copy
import json

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import data_folder, token_reference, token_rows
from torch.nn import functional

from lora_ogpsa import Reference, default_references
from lora_ogpsa.answers import base_mode, own_answers
from lora_ogpsa.errors import ConfigError, DataError
from lora_ogpsa.hidden_states import read_inputs
from lora_ogpsa.reference import Objective

PROMPTS = [{"prompt": f"tell me about topic {i}"} for i in range(5)]
PAIRS = [
    {"prompt": f"question {i}", "chosen": "a good answer", "rejected": "a bad, longer answer"}
    for i in range(3)
]


def answer_log_probs(model, prompt, answer):
    """Log-probabilities [answer length, vocabulary] of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def token_nll(model, prompt, answer):
    scores = answer_log_probs(model, prompt, answer)
    return -scores.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------ losses


def test_sft_loss_is_the_answers_own_mean(tiny_peft):
    model = tiny_peft(warm=True).eval()
    objective = Reference("a", token_rows(5), loss="sft", first_tokens=None).prepare(model)
    losses, excess = objective.losses(model, range(5))
    for i, (prompt, answer) in enumerate(objective.sequences):
        mean = token_nll(model, prompt, answer).mean()
        torch.testing.assert_close(losses[i], mean)
        with base_mode(model):
            base = token_nll(model, prompt, answer).mean()
        torch.testing.assert_close(excess[i], mean - base, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_first_tokens_are_mixed_in(tiny_peft, share):
    model = tiny_peft(warm=True).eval()
    reference = Reference("a", token_rows(4), loss="sft", first_tokens=3, first_tokens_weight=share)
    objective = reference.prepare(model)
    losses, _ = objective.losses(model, range(4))
    for i, (prompt, answer) in enumerate(objective.sequences):
        nll = token_nll(model, prompt, answer)
        expected = (1 - share) * nll.mean() + share * nll[:3].mean()
        torch.testing.assert_close(losses[i], expected)


def test_what_the_base_model_says_is_asked_once_per_example(tiny_peft, monkeypatch):
    model = tiny_peft(warm=True).eval()
    objective = Reference("a", token_rows(3), loss="kl").prepare(model)
    asked = []
    forward = Objective._log_probs
    monkeypatch.setattr(
        Objective, "_log_probs", lambda *a: asked.append(len(a[2]["labels"])) or forward(*a)
    )
    first, _ = objective.losses(model, [0, 1])
    assert asked == [1, 1, 2]
    again, _ = objective.losses(model, [2, 1, 0])
    assert asked == [1, 1, 2, 1, 3]
    torch.testing.assert_close(again[[2, 1]], first)


def test_without_room_the_base_model_is_asked_again(tiny_peft, monkeypatch):
    monkeypatch.setattr("lora_ogpsa.reference._BASE_SCORES_BYTES", 0)
    model = tiny_peft(warm=True).eval()
    objective = Reference("a", token_rows(2), loss="kl").prepare(model)
    first, _ = objective.losses(model, [0, 1])
    again, _ = objective.losses(model, [0, 1])
    assert torch.equal(first, again) and not objective._base_scores


@pytest.mark.parametrize("loss", ["kl", "sft", "distill"])
def test_the_excess_does_not_depend_on_what_was_measured_before(tiny_peft, loss):
    """A resumed run meets the examples in other batches than those that first asked the base."""
    model = tiny_peft(warm=True).eval()
    fresh, resumed = (Reference("a", token_rows(6), loss=loss).prepare(model) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh.losses(model, [0, 1, 2])
        fresh.losses(model, [3, 4, 5])
        _, one = fresh.losses(model, [1, 3, 5])
        _, other = resumed.losses(model, [1, 3, 5])
    assert torch.equal(one, other)


def test_kl_is_the_divergence_from_the_base(tiny_peft):
    model = tiny_peft(warm=True).eval()
    objective = Reference("a", token_rows(3), loss="kl", first_tokens=None).prepare(model)
    losses, excess = objective.losses(model, range(3))
    for i, (prompt, answer) in enumerate(objective.sequences):
        current = answer_log_probs(model, prompt, answer)
        with base_mode(model):
            base = answer_log_probs(model, prompt, answer)
        expected = (base.exp() * (base - current)).sum(-1).mean()
        torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-7)
        assert excess[i] == losses[i] > 0


def test_kl_of_an_untrained_adapter_is_zero_with_zero_gradient(tiny_peft):
    model = tiny_peft()
    objective = Reference("a", token_rows(3), loss="kl").prepare(model.eval())
    losses, _ = objective.losses(model, range(3))
    grads = torch.autograd.grad(
        losses.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    assert losses.abs().max() < 1e-6
    assert max(float(g.abs().max()) for g in grads if g is not None) < 1e-6


def test_dpo_is_the_published_loss(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True).eval()
    objective = Reference("p", PAIRS, loss="dpo", beta=0.3).prepare(model, tiny_tokenizer)
    assert len(objective) == 3
    losses, excess = objective.losses(model, range(3))
    for i in range(3):
        ratios = []
        for prompt, answer in objective.sequences[2 * i : 2 * i + 2]:
            own = -token_nll(model, prompt, answer).sum()
            with base_mode(model):
                base = -token_nll(model, prompt, answer).sum()
            ratios.append(own - base)
        expected = -functional.logsigmoid(0.3 * (ratios[0] - ratios[1]))
        torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-6)
        # the base model against itself is at log 2
        torch.testing.assert_close(excess[i], expected - torch.tensor(2.0).log(), atol=1e-5, rtol=0)


def test_an_example_scores_the_same_alone_and_in_a_batch(tiny_peft):
    model = tiny_peft(warm=True).eval()
    rows = token_rows(2, shortest=4, longest=5) + token_rows(2, seed=2, shortest=50, longest=60)
    objective = Reference("a", rows, loss="kl").prepare(model)
    together, _ = objective.losses(model, range(4))
    for i in range(4):
        alone, _ = objective.losses(model, [i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ rows


def test_text_rows_need_a_tokenizer(tiny_peft):
    with pytest.raises(ConfigError, match="`own` holds text.*processing_class"):
        Reference("own", PROMPTS).prepare(tiny_peft())


def test_a_tokenizer_is_not_its_name(tiny_peft):
    with pytest.raises(ConfigError, match="`a` holds text, and there is no tokenizer"):
        Reference("a", PROMPTS).prepare(tiny_peft(), "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_empty_reference_is_refused(tiny_peft):
    with pytest.raises(DataError, match="`none` has no rows.*protects nothing"):
        Reference("none", []).prepare(tiny_peft())
    with pytest.raises(DataError, match="no rows of kind 'x'"):
        Reference("none", PROMPTS, kind="x").prepare(tiny_peft())


@pytest.mark.parametrize("loss", ["kl", "sft"])
def test_token_ids_without_a_learned_label_are_refused_with_a_way_out(tiny_peft, loss):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    with pytest.raises(DataError, match="1 of 1 rows have no answer.*learned `labels`"):
        Reference("a", rows, loss=loss).prepare(tiny_peft())


def test_sft_without_an_answer_is_refused_with_a_way_out(tiny_peft, tiny_tokenizer):
    rows = [{**PROMPTS[0], "completion": "an answer"}, *PROMPTS]
    message = r"`a`, row 2: .*needs rows with an answer.*\['prompt'\].*kl"
    with pytest.raises(DataError, match=message):
        Reference("a", rows, loss="sft").prepare(tiny_peft(), tiny_tokenizer)


@pytest.mark.parametrize("adapted", ["q_proj", "embed_tokens"])
@pytest.mark.parametrize("token", [512, -100])
def test_tokens_without_an_embedding_are_refused(tiny_peft, adapted, token):
    rows = [{"input_ids": [5, 511, 7], "labels": [-100, 511, 7]}]
    model = tiny_peft(target_modules=[adapted])
    Reference("a", rows, loss="sft").prepare(model)
    rows[0]["input_ids"][0] = token
    with pytest.raises(DataError, match=f"`a` has the token {token}, and the model has 512"):
        Reference("a", rows, loss="sft").prepare(model)


class _Bare(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(512, 8)
        self.head = torch.nn.Linear(8, 512)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


def test_a_model_that_cannot_be_called_as_a_language_model_is_refused():
    model = get_peft_model(_Bare(), LoraConfig(target_modules=["head"]))
    with pytest.raises(ConfigError, match="`forward` of _Bare does not take use_cache"):
        token_reference().prepare(model)


def test_a_model_of_mixed_adapters_is_called_with_positions(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    seen = []
    model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    objective = token_reference(n=2).prepare(model)
    objective.losses(model, [0, 1])
    assert {"position_ids", "logits_to_keep"} <= seen[0].keys()


@pytest.mark.parametrize("field", ["labels", "attention_mask"])
def test_unequal_ids_and_labels_are_refused(tiny_peft, field):
    rows = [*token_rows(1), {"input_ids": [1, 2, 3], field: [1, 1]}]
    with pytest.raises(DataError, match=f"`a`, row 2: .*3 `input_ids` and 2 `{field}`"):
        Reference("a", rows, loss="sft").prepare(tiny_peft())


def padded(row, left, right, mask):
    """A row as a tokenizer pads it, with its attention mask or without."""
    size = len(row["input_ids"])
    out = {
        "input_ids": [2] * left + row["input_ids"] + [2] * right,
        "labels": [-100] * left + row["labels"] + [-100] * right,
    }
    return {**out, "attention_mask": [0] * left + [1] * size + [0] * right} if mask else out


@pytest.mark.parametrize(
    ("left", "right", "mask"), [(0, 7, True), (0, 7, False), (5, 0, True), (5, 7, True)]
)
def test_padding_is_neither_prompt_nor_answer(tiny_peft, left, right, mask):
    rows = token_rows(4)
    plain, filled = (
        Reference("a", data, loss="sft").prepare(tiny_peft()).sequences
        for data in (rows, [padded(row, left, right, mask) for row in rows])
    )
    assert filled == plain


def test_without_labels_all_that_is_seen_is_learned(tiny_peft):
    row = {"input_ids": [2, 2, 5, 6, 7, 8, 2], "attention_mask": [0, 0, 1, 1, 1, 1, 0]}
    bare = {"input_ids": [5, 6, 7, 8], "labels": None, "attention_mask": None}  # as in a table
    for rows in ([row], [bare]):
        objective = Reference("a", rows, loss="sft").prepare(tiny_peft())
        assert objective.sequences == [([5], [6, 7, 8])]


def test_learned_tokens_in_several_pieces_are_refused(tiny_peft):
    turns = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, 4, -100, -100, 7, 8]}
    with pytest.raises(DataError, match="`a`, row 2: `labels` are -100 again .*a row of each turn"):
        Reference("a", [*token_rows(1), turns], loss="sft").prepare(tiny_peft())


def test_token_ids_are_held_to_the_limit_on_length(tiny_peft):
    row = {"input_ids": list(range(3, 29)), "labels": [-100] * 5 + list(range(8, 29))}
    objective = Reference("a", [row], loss="sft", max_length=8).prepare(tiny_peft())
    assert objective.sequences == [([3, 4, 5, 6, 7], [8, 9, 10])]
    full = Reference("a", [row], loss="sft", max_length=5)
    with pytest.raises(DataError, match="`a`, row 1: the prompt has 5 tokens and max_length is 5"):
        full.prepare(tiny_peft())


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_token_ids_may_be_tensors_and_are_kept_as_numbers(tiny_peft, form):
    """A checkpoint holds them as JSON."""
    plain = Reference("a", token_rows(3), loss="sft").prepare(tiny_peft())
    table = datasets.Dataset.from_list(token_rows(3)).with_format(form)
    found = Reference("a", table, loss="sft").prepare(tiny_peft())
    assert found.sequences == plain.sequences
    assert json.dumps(found.identity()) == json.dumps(plain.identity())


def test_token_ids_of_several_rows_in_one_are_refused(tiny_peft):
    rows = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    with pytest.raises(DataError, match="row 1: `input_ids` should be one list of whole numbers"):
        Reference("a", rows, loss="sft").prepare(tiny_peft())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (["Hello", "Hi"], "list of str"),
        ({"prompt": "Hello"}, "dict of str"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(PROMPTS)), "DatasetDict of str"),
        ([{"prompt": "Hello"}, None], "list of NoneType"),
        (None, "NoneType"),
    ],
)
def test_what_holds_no_rows_is_refused(tiny_peft, tiny_tokenizer, data, found):
    with pytest.raises(DataError, match=f"`a`: `data` should be a file.*Found {found}"):
        Reference("a", data).prepare(tiny_peft(), tiny_tokenizer)


def test_a_prompt_longer_than_the_limit_is_refused(tiny_peft, tiny_tokenizer):
    rows = [{"prompt": "word"}, {"prompt": "word " * 200}]
    with pytest.raises(DataError, match="reference `long`, row 2: the prompt has .* max_length"):
        Reference("long", rows, max_length=64).prepare(tiny_peft(), tiny_tokenizer)


@pytest.mark.parametrize(
    ("loss", "message"),
    [("kl", "row 12: no conversation found"), ("dpo", "row 12: no preference pair found")],
)
def test_a_bad_row_is_named_as_it_stands_in_the_data(tiny_peft, tiny_tokenizer, loss, message):
    rows = [{"kind": "other"}] * 10 + [PAIRS[0], {"text": "no fields of ours"}]
    rows = [{"kind": "mine", **row} for row in rows]  # the first ten are not of the kind
    reference = Reference("own", rows, loss=loss, kind="mine", limit=2)
    with pytest.raises(DataError, match=f"^reference `own`, {message}"):
        reference.prepare(tiny_peft(), tiny_tokenizer)


def test_limit_draws_the_same_rows_every_time(tiny_peft):
    rows = token_rows(50)
    first, second, other = (
        Reference("a", rows, loss="sft", limit=10, seed=seed).prepare(tiny_peft()).sequences
        for seed in (1, 1, 2)
    )
    assert len(first) == 10
    assert first == second != other


def test_a_data_set_may_have_configurations(tiny_peft, tmp_path):
    main, other = token_rows(4), token_rows(3, seed=1)
    folder = data_folder(tmp_path, main=main, other=other)
    for config, rows in (("main", main), ("other", other)):
        found = Reference("own", folder, loss="sft", config=config, split="test")
        same = Reference("own", rows, loss="sft")
        assert found.prepare(tiny_peft()).sequences == same.prepare(tiny_peft()).sequences
    with pytest.raises(DataError, match="main"):  # the message names those that there are
        Reference("own", folder, loss="sft", split="test").prepare(tiny_peft())


@pytest.mark.parametrize("kind", [None, "even"])
def test_of_a_large_data_set_only_the_rows_used_are_read(tiny_peft, tmp_path, monkeypatch, kind):
    rows = [{**row, "kind": ("even", "odd")[i % 2]} for i, row in enumerate(token_rows(40))]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    read = []
    to_list = datasets.Dataset.to_list
    monkeypatch.setattr(
        datasets.Dataset,
        "to_list",
        lambda table: read.append((table.column_names, len(table))) or to_list(table),
    )
    stored, listed = (
        Reference("a", data, loss="sft", kind=kind, limit=5).prepare(tiny_peft()).sequences
        for data in (tmp_path / "saved", rows)
    )
    assert stored == listed
    assert [size for columns, size in read if columns != ["kind"]] == [5]


def test_a_data_set_without_kinds_has_no_rows_of_one(tiny_peft, tmp_path):
    datasets.Dataset.from_list(token_rows(4)).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no rows of kind 'x'"):
        Reference("none", tmp_path / "saved", loss="sft", kind="x").prepare(tiny_peft())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"loss": "mse"}, "`loss`"),
        ({"weight": 0}, "`weight`"),
        ({"budget": -1}, "`budget`"),
        ({"first_tokens": 0}, "`first_tokens`"),
        ({"first_tokens_weight": 1.5}, "`first_tokens_weight`"),
        ({"limit": 0}, "`limit`"),
        ({"beta": -0.1}, "`beta`"),
        ({"max_length": "long"}, "`max_length`"),
        ({"limit": 10.5}, "`limit`.*whole number"),
        ({"first_tokens_weight": "half"}, "`first_tokens_weight`"),
        # Nothing would be constrained, the other references neither.
        ({"budget": float("inf")}, "`budget`.*below"),
        ({"budget": float("nan")}, "`budget`"),
        ({"share": 1e39}, "`share`"),
    ],
)
def test_settings_are_checked_by_name(values, named):
    with pytest.raises(ConfigError, match=f"`r`: {named}"):
        Reference("r", [], **values)


def test_rows_in_memory_are_not_printed():
    shown = repr(Reference("a", [{"prompt": "private"}], share=2.0))
    assert shown.startswith("Reference(name='a', data=<list of 1 rows>, loss='kl', ")
    assert "share=2.0" in shown and "private" not in shown
    assert "data='embedded:harmless'" in repr(Reference("b"))


def test_default_references_are_the_embedded_prompts(tiny_peft, tiny_tokenizer):
    references = default_references()
    assert [r.name for r in references] == ["general", "general_first", "lookalike"]
    assert all(r.loss == "kl" and r.data == "embedded:harmless" for r in references)


# ------------------------------------------------------------------ the base model's own answers


def encoded(tokenizer):
    return [tokenizer(row["prompt"])["input_ids"] for row in PROMPTS]


def test_answers_are_the_base_models_and_greedy(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True).train()
    prompts = encoded(tiny_tokenizer)
    answers = own_answers(model, tiny_tokenizer, prompts, max_new_tokens=4, batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad(), base_mode(model):
                best = int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            assert token == best
            ids.append(token)


@pytest.mark.parametrize("missing", [["pad_token"], ["pad_token", "eos_token"]])
def test_a_tokenizer_without_a_pad_token_will_do(tiny_peft, tiny_model, tiny_tokenizer, missing):
    model = tiny_peft(tiny_model(pad_token_id=None, eos_token_id=None))
    bare = copy.deepcopy(tiny_tokenizer)
    for name in missing:
        setattr(bare, name, None)
    assert bare.pad_token_id is None
    rows = [{"prompt": "word " * i} for i in (1, 9, 4)]  # of three lengths: two are padded
    own = Reference("own", rows, max_new_tokens=4)
    assert own.prepare(model, bare).sequences == own.prepare(model, tiny_tokenizer).sequences


def test_the_models_generation_settings_change_no_answer(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True)
    prompts = encoded(tiny_tokenizer)
    plain = own_answers(model, tiny_tokenizer, prompts, max_new_tokens=6)
    asked_for = {"do_sample": True, "temperature": 3.0, "num_beams": 2}
    penalties = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1}
    for name, value in (asked_for | penalties).items():
        setattr(model.generation_config, name, value)
    assert own_answers(model, tiny_tokenizer, prompts, max_new_tokens=6) == plain


def test_answers_are_kept_and_not_made_twice(tiny_peft, tiny_tokenizer, tmp_path, monkeypatch):
    model = tiny_peft()
    prompts = encoded(tiny_tokenizer)
    kwargs = {"max_new_tokens": 4, "cache": tmp_path}
    first = own_answers(model, tiny_tokenizer, prompts[:3], **kwargs)
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    file.write_text(file.read_text() + '{"key": "torn')  # as an interruption leaves it
    again = own_answers(model, tiny_tokenizer, prompts, **kwargs)
    assert again[:3] == first
    lines = [line for line in file.read_text().splitlines() if not line.endswith("torn")]
    assert len({json.loads(line)["key"] for line in lines}) == 5
    monkeypatch.setattr(model, "generate", None)
    assert own_answers(model, tiny_tokenizer, prompts, **kwargs) == again


def test_other_stop_tokens_make_other_answers(tiny_peft, tiny_tokenizer, tmp_path):
    """As where a model's generation_config.json is put right after its answers ran on."""
    model = tiny_peft(warm=True)
    prompts = encoded(tiny_tokenizer)[:2]
    kwargs = {"max_new_tokens": 4, "cache": tmp_path}
    long = own_answers(model, tiny_tokenizer, prompts, **kwargs)
    assert [len(answer) for answer in long] == [4, 4]
    model.generation_config.eos_token_id = [answer[1] for answer in long]
    short = own_answers(model, tiny_tokenizer, prompts, **kwargs)
    assert all(len(answer) <= 2 for answer in short)
    model.generation_config.eos_token_id = None
    assert own_answers(model, tiny_tokenizer, prompts, **kwargs) == long


def test_progress_goes_to_standard_error(tiny_peft, tiny_tokenizer, capsys):
    model = tiny_peft()
    own_answers(model, tiny_tokenizer, encoded(tiny_tokenizer), max_new_tokens=4, title="ask")
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("ask ")
    readers = ["model.layers.0.self_attn.q_proj"]
    tokens = [([3, 4, 5], [6])], [[([3, 4, 7], [8])]]
    read_inputs(model.get_base_model(), readers, *tokens, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "contrast adapter: looking at prompts" in shown.err


def test_another_base_model_answers_for_itself(tiny_peft, tiny_model, tiny_tokenizer, tmp_path):
    prompts = encoded(tiny_tokenizer)[:1]
    kwargs = {"max_new_tokens": 4, "cache": tmp_path}
    own_answers(tiny_peft(tiny_model(seed=1)), tiny_tokenizer, prompts, **kwargs)
    own_answers(tiny_peft(tiny_model(seed=2)), tiny_tokenizer, prompts, **kwargs)
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 2


def test_generation_leaves_no_trace(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True, lora_dropout=0.2).train()
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    own_answers(model, tiny_tokenizer, encoded(tiny_tokenizer), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
