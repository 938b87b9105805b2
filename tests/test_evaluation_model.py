"""Generation, likelihoods and divergence against naive loops; nothing left behind."""

import random

import numpy as np
import pytest
import torch

from lora_ogpsa.errors import DataError, ModelError
from lora_ogpsa.evaluation.divergence import divergence
from lora_ogpsa.evaluation.generate import generate
from lora_ogpsa.evaluation.likelihood import Score, batches, model_inputs, score
from lora_ogpsa.evaluation.multiple_choice import (
    Question,
    as_question,
    choice_requests,
    judge_choices,
)
from lora_ogpsa.evaluation.progress import Progress
from lora_ogpsa.evaluation.store import Section
from lora_ogpsa.generation import greedy_replies, stop_tokens

QUIET = Progress(False)


def token_pairs(n, seed=0, prompt=(3, 30), answer=(1, 12)):
    """`n` pairs of random token ids of very different lengths."""
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(3, 300) for _ in range(draw.randint(*prompt))],
            [draw.randrange(3, 300) for _ in range(draw.randint(*answer))],
        )
        for _ in range(n)
    ]


def memory(fingerprint="f"):
    return Section(None, fingerprint)


def naive_log_probs(model, prompt, answer):
    """Log-probabilities [answer length, vocabulary] before each answer token, one row at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def naive_greedy(model, prompt, stops, limit):
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


class Snapshot:
    """Everything about a model, a tokenizer and the process that measuring must not change."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.before = self.take()

    def take(self):
        model, tokenizer = self.model, self.tokenizer
        return {
            "modes": [module.training for module in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grad": [
                None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()
            ],
            "weights": [float(p.double().sum()) for p in model.parameters()],
            "hooks": [
                len(module._forward_hooks) + len(module._forward_pre_hooks)
                for module in model.modules()
            ],
            "use_cache": model.config.use_cache,
            "generation": model.generation_config.to_dict(),
            "padding": (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side),
            "checkpointing": model.is_gradient_checkpointing,
            "adapter": [
                module.disable_adapters
                for module in model.modules()
                if hasattr(module, "disable_adapters")
            ],
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
            "grad_mode": torch.is_grad_enabled(),
        }

    def check(self):
        after = self.take()
        assert [name for name in after if after[name] != self.before[name]] == []


@pytest.fixture
def busy_model(tiny_peft):
    """An adapter as it is in the middle of training, with unusual settings everywhere."""
    model = tiny_peft(warm=True, lora_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    model.generation_config.repetition_penalty = 1.8
    frozen = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    frozen.requires_grad_(False)  # by hand: PEFT would switch it on again
    model.base_model.model.model.layers[1].eval()
    ids = torch.randint(3, 300, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_generation_settings_change_no_answer(
    adapted, tiny_model, tiny_peft, tiny_tokenizer
):
    model = tiny_peft(warm=True) if adapted else tiny_model()
    prompts = [[5, 6, 7], [9, 8]]

    def answers():
        return greedy_replies(model, tiny_tokenizer, prompts, 4, {2})

    plain, own = answers(), model.generation_config
    for name, value in {
        "suppress_tokens": plain[0],
        "bad_words_ids": [[plain[1][0]]],
        "sequence_bias": [[[7], 50.0]],
        "forced_eos_token_id": 2,
        "encoder_repetition_penalty": 1.5,
        "guidance_scale": 2.0,
        "stop_strings": ["a"],  # for these three generate() asks for more, or stops
        "num_return_sequences": 2,
        "prompt_lookup_num_tokens": 3,
    }.items():
        setattr(own, name, value)
        assert answers() == plain, name
        assert model.generation_config is own and getattr(own, name) == value
        setattr(own, name, None)


def test_measuring_leaves_no_trace(busy_model, tiny_tokenizer):
    snapshot = Snapshot(busy_model, tiny_tokenizer)
    pairs = token_pairs(3)
    generate(
        busy_model,
        tiny_tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=3,
        cache=memory(),
        progress=QUIET,
    )
    score(busy_model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    divergence(busy_model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    snapshot.check()


# ---------------------------------------------------------------------- generation


def test_batched_answers_are_those_of_a_greedy_loop(busy_model, tiny_tokenizer):
    prompts = [prompt for prompt, _ in token_pairs(7)]
    found = generate(
        busy_model,
        tiny_tokenizer,
        prompts,
        max_new_tokens=6,
        batch_size=3,
        cache=memory(),
        progress=QUIET,
    )
    busy_model.eval()
    stops = stop_tokens(busy_model, tiny_tokenizer)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.ids == naive_greedy(busy_model, prompt, stops, 6)
        assert answer.cut == (answer.ids[-1] not in stops)
        decoded = tiny_tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.text == decoded.strip()


def test_answers_end_at_any_stop_token(tiny_model, tiny_tokenizer):
    model = tiny_model()
    prompt = [5, 6, 7]
    free = generate(
        model, tiny_tokenizer, [prompt], max_new_tokens=5, cache=memory(), progress=QUIET
    )[0]
    model.generation_config.eos_token_id = [2, free.ids[2]]
    stopped = generate(
        model, tiny_tokenizer, [prompt], max_new_tokens=5, cache=memory(), progress=QUIET
    )[0]
    end = free.ids.index(free.ids[2])
    assert stopped.ids == free.ids[: end + 1]
    assert free.cut and not stopped.cut


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    prompts = [prompt for prompt, _ in token_pairs(8)]
    prompts.append(prompts[0])  # answered once
    settings = {"max_new_tokens": 4, "batch_size": 3, "progress": QUIET}
    whole = generate(model, tiny_tokenizer, prompts, cache=memory(), **settings)
    seen = []
    real = model.generate

    def interrupted(**inputs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(inputs["input_ids"].tolist())
        return real(**inputs)

    path = tmp_path / "answers.jsonl"
    model.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(model, tiny_tokenizer, prompts, cache=Section(path, "f"), **settings)
    rest = []
    model.generate = lambda **inputs: rest.append(inputs["input_ids"].tolist()) or real(**inputs)
    again = generate(model, tiny_tokenizer, prompts, cache=Section(path, "f"), **settings)
    assert again == whole
    assert [len(batch) for batch in seen + rest] == [3, 3, 2]
    model.generate = None  # everything is there: the model is not asked
    assert generate(model, tiny_tokenizer, prompts, cache=Section(path, "f"), **settings) == whole


def test_other_settings_or_another_model_are_answered_anew(tiny_model, tiny_tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    settings = {"batch_size": 2, "progress": QUIET}
    prompts = [[5, 6, 7]]

    def ids(model, fingerprint, n):
        cache = Section(path, fingerprint)
        found = generate(model, tiny_tokenizer, prompts, max_new_tokens=n, cache=cache, **settings)
        return found[0].ids

    first, second = tiny_model(seed=0), tiny_model(seed=1)
    a, b = ids(first, "a", 4), ids(second, "b", 4)
    assert a != b
    assert ids(first, "a", 6)[:4] == a
    assert (ids(first, "a", 4), ids(second, "b", 4)) == (a, b)


# ---------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_are_those_of_single_rows(tiny_peft, tiny_tokenizer, batch_tokens):
    model = tiny_peft(warm=True)
    pairs = token_pairs(9)
    found = score(
        model, tiny_tokenizer, pairs, batch_tokens=batch_tokens, cache=memory(), progress=QUIET
    )
    model.eval()
    for (prompt, answer), got in zip(pairs, found, strict=True):
        expected = naive_log_probs(model, prompt, answer)
        picked = expected[range(len(answer)), answer]
        assert got.logprob == pytest.approx(float(picked.sum()), abs=1e-4)
        assert got.tokens == len(answer)
        assert got.greedy == (expected.argmax(-1).tolist() == answer)


def test_greedy_continuations_are_recognised(tiny_model, tiny_tokenizer):
    model = tiny_model()
    best = naive_greedy(model, [5, 6, 7], set(), 4)
    worst = [*best[:-1], (best[-1] + 1) % 300]
    found = score(
        model,
        tiny_tokenizer,
        [([5, 6, 7], best), ([5, 6, 7], worst)],
        cache=memory(),
        progress=QUIET,
    )
    assert [s.greedy for s in found] == [True, False]


def test_long_continuations_are_scored_in_slices(tiny_model, tiny_tokenizer):
    model = tiny_model(max_position_embeddings=1024)
    prompt, answer = token_pairs(1, prompt=(4, 4), answer=(600, 600))[0]
    got = score(model, tiny_tokenizer, [(prompt, answer)], cache=memory(), progress=QUIET)[0]
    expected = naive_log_probs(model, prompt, answer)[range(600), answer].sum()
    assert got.logprob == pytest.approx(float(expected), abs=1e-2)


def test_one_pass_serves_all_one_token_choices(tiny_model, tiny_tokenizer):
    model = tiny_model()
    rows, vocabulary_rows = [], []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: vocabulary_rows.append(out.shape[:2].numel())
    )
    context = [5, 6, 7, 8]
    requests = [(context, [t]) for t in (20, 21, 22, 23)] + [(context, [20, 30])]
    score(model, tiny_tokenizer, requests, cache=memory(), progress=QUIET)
    assert sum(rows) == 2  # the context, and the context with one more token
    assert sum(vocabulary_rows) == 1 + 2  # only positions that predict something


def test_a_forward_that_bypasses_the_output_layer_is_scored_all_the_same(
    tiny_model, tiny_tokenizer
):
    model = tiny_model()
    pairs = token_pairs(4)
    expected = score(model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    head = model.lm_head

    class Bypass(torch.nn.Module):
        """Holds the weight, but the model multiplies by it itself."""

        def __init__(self):
            super().__init__()
            self.weight = head.weight

    bypass = Bypass()
    model.get_output_embeddings = lambda: bypass
    found = score(model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-5)


def test_an_adapter_on_the_output_layer_counts(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True, target_modules=["lm_head", "q_proj"])
    pairs = token_pairs(3)
    found = score(model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    model.eval()
    for (prompt, answer), got in zip(pairs, found, strict=True):
        expected = naive_log_probs(model, prompt, answer)[range(len(answer)), answer].sum()
        assert got.logprob == pytest.approx(float(expected), abs=1e-4)


def test_batches_are_bounded_by_tokens_and_by_positions():
    requests = {str(i): pair for i, pair in enumerate(token_pairs(40, prompt=(5, 60)))}
    requests["long"] = ([5] * 300, [6] * 2000)
    inputs = model_inputs(requests)
    found = list(batches(inputs, requests, 256))
    assert [ids for batch, _ in found for ids in batch] == list(inputs)
    for batch, tails in found:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 256
        assert len(batch) == len(tails)
    assert len(found) < 20
    flat = {str(i): ([5] * i, [6] * 400) for i in range(1, 6)}
    sizes = [len(batch) for batch, _ in batches(model_inputs(flat), flat, 10_000)]
    assert sizes == [2, 2, 1]  # at most 1024 positions reach the vocabulary


@pytest.mark.parametrize("pair", [([], [5]), ([5], [])])
def test_empty_texts_are_refused(tiny_model, tiny_tokenizer, pair):
    for measure in (score, divergence):
        with pytest.raises(DataError, match="Remove rows with empty answers"):
            measure(tiny_model(), tiny_tokenizer, [pair], cache=memory(), progress=QUIET)


def test_reduced_precision_is_kept_apart_from_full(tiny_model, tiny_tokenizer):
    model, cache, pairs = tiny_model(), memory(), token_pairs(2)
    full = score(model, tiny_tokenizer, pairs, cache=cache, progress=QUIET)
    half = score(model, tiny_tokenizer, pairs, autocast=torch.bfloat16, cache=cache, progress=QUIET)
    assert full != half
    assert [s.logprob for s in half] == pytest.approx([s.logprob for s in full], rel=0.02)


# ---------------------------------------------------------------------- multiple choice

QUESTION = {"question": "What is it? ", "choices": ["a", "bb", "ccc"], "answer": 1}


def test_questions_read_as_the_harness_prompts_them():
    cloze = as_question(QUESTION)
    assert cloze == Question("Question: What is it? \nAnswer:", ["a", "bb", "ccc"], 1)
    letters = as_question({**QUESTION, "subject": "us_history"}, "letters")
    assert letters.context == (
        "The following are multiple choice questions (with answers) about us history.\n\n"
        "What is it?\nA. a\nB. bb\nC. ccc\nAnswer:"
    )
    assert letters.choices == ["A", "B", "C"]


@pytest.mark.parametrize(
    "changed",
    [
        {"answer": "B"},
        {"answer": "1"},
        {"choices": {"text": ["a", "bb", "ccc"], "label": ["1", "2", "3"]}, "answer": "2"},
        {"choices": {"text": ["a", "bb", "ccc"], "label": ["A", "B", "C"]}, "answer": "B"},
    ],
)
def test_answers_are_read_by_index_letter_or_label(changed):
    assert as_question({**QUESTION, **changed}).answer == 1
    renamed = {**QUESTION, **changed}
    renamed["answerKey"] = renamed.pop("answer")
    assert as_question(renamed).answer == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "choices": ["a"]}, "needs `question`, `choices` and `answer`"),
        ({"question": "x", "choices": [], "answer": 0}, "needs `question`"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, r"Found the fields \['answer', 'choi"),
        ({"question": "x", "choices": ["a"], "answer": 1}, "none of the 1 choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": "C"}, "'C' is none of the 2"),
        ({"question": "x", "choices": ["a", "b"], "answer": 0.5}, "0.5 is none of the 2"),
        ({"question": "x", "choices": ["a", "b"], "answer": [0]}, r"\[0\] is none of the 2"),
        ({"question": "x", "choices": "ab", "answer": 0}, "`choices` should be a list. Found 'ab'"),
        ({"question": "x", "choices": list(range(27)), "answer": 0}, "27 choices cannot be listed"),
    ],
)
def test_bad_questions_are_named(row, message):
    with pytest.raises(DataError, match=f"^row 7: .*{message}"):
        as_question(row, "letters", name="row 7")


@pytest.mark.parametrize(
    ("choices", "answer"),
    [(["a", "b"], 1.0), ({"text": ["a", "b"], "label": None}, "B"), (["a", "b"], "1")],
)
def test_what_tables_make_of_an_answer(choices, answer):
    row = {"question": "x", "choices": choices, "answer": answer}
    assert as_question(row).answer == 1


def test_normalised_accuracy_divides_by_characters():
    question = Question("", ["a", "bbbb"], 1)
    scores = [Score(-2.0, 1, False), Score(-4.0, 1, False)]  # -2 and -1 per character
    assert judge_choices(question, scores) == (False, True)
    level = [Score(-1.0, 1, False), Score(-1.0, 1, False)]
    assert judge_choices(Question("", ["a", "b"], 0), level) == (True, True)  # the first wins
    assert judge_choices(Question("", ["a", "b"], 1), level) == (False, False)


def test_choices_are_tokenised_with_their_context(tiny_tokenizer):
    requests = choice_requests(tiny_tokenizer, Question("The capital of", ["France", "it"], 0), 256)
    for (context, continuation), choice in zip(requests, ["France", "it"], strict=True):
        whole = tiny_tokenizer(f"The capital of {choice}")["input_ids"]
        assert context + continuation == whole
        assert tiny_tokenizer.decode(continuation) == f" {choice}"


def test_a_context_that_is_too_long_loses_its_beginning(tiny_tokenizer):
    question = Question("word " * 50 + "end", ["France"], 0)
    (context, continuation) = choice_requests(tiny_tokenizer, question, 20)[0]
    assert len(context) + len(continuation) == 21  # the last token is predicted, not read
    assert tiny_tokenizer.decode(context).endswith("end")


# ---------------------------------------------------------------------- divergence


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_divergence_is_that_of_single_rows(tiny_peft, tiny_tokenizer, batch_tokens):
    model = tiny_peft(warm=True, lora_dropout=0.3)
    pairs = token_pairs(6)
    found = divergence(
        model,
        tiny_tokenizer,
        pairs,
        first=3,
        batch_tokens=batch_tokens,
        cache=memory(),
        progress=QUIET,
    )
    model.eval()
    for (prompt, answer), got in zip(pairs, found, strict=True):
        with model.disable_adapter():
            base = naive_log_probs(model, prompt, answer)
        kl = (base.exp() * (base - naive_log_probs(model, prompt, answer))).sum(-1)
        assert got.total == pytest.approx(float(kl.sum()), rel=1e-3)
        assert got.first_total == pytest.approx(float(kl[:3].sum()), rel=1e-3)
        assert (got.tokens, got.first_tokens) == (len(answer), min(3, len(answer)))
        assert got.total > 1e-3


def test_a_merged_adapter_is_not_quietly_unmerged(tiny_peft, tiny_tokenizer):
    model = tiny_peft(warm=True)
    model.merge_adapter()
    with pytest.raises(ModelError, match="unmerge_adapter"):
        divergence(model, tiny_tokenizer, token_pairs(1), cache=memory(), progress=QUIET)
    assert model.get_model_status().merged_adapters == ["default"]


def test_an_untrained_adapter_has_not_diverged(tiny_peft, tiny_tokenizer):
    found = divergence(tiny_peft(), tiny_tokenizer, token_pairs(3), cache=memory(), progress=QUIET)
    assert [d.total for d in found] == [0.0, 0.0, 0.0]


def test_a_four_bit_model_is_measured(tiny_4bit, tiny_tokenizer):
    model = tiny_4bit(warm=True)
    pairs = token_pairs(3)
    found = divergence(model, tiny_tokenizer, pairs, cache=memory(), progress=QUIET)
    assert all(0 < d.total < 50 for d in found)
    answers = generate(
        model,
        tiny_tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=2,
        cache=memory(),
        progress=QUIET,
    )
    assert all(answer.ids for answer in answers)
