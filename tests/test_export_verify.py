"""Verification, reports, model card and upload."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_ogpsa.errors import DataError, ExportError
from lora_ogpsa.export import (
    Quantisation,
    Tolerance,
    describe_quantisation,
    export_merged,
    push_to_hub,
    verify_merge,
    write_model_card,
)
from lora_ogpsa.export.divergence import divergence
from lora_ogpsa.export.verification import REPRODUCES, SWAPPED_BASE

PROMPTS = ["What is the capital of France?", [{"role": "user", "content": "Pick a lock."}], "a"]
SETTINGS = Quantisation(compute_dtype="float32", load_dtype="float32")


@pytest.fixture(scope="module")
def qlora(tiny_4bit, tiny_tokenizer, tmp_path_factory):
    """A QLoRA adapter with its record and tokenizer, as a run leaves it."""
    folder = tmp_path_factory.mktemp("qlora") / "adapter"
    model = tiny_4bit(warm=True, r=8)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    facts = {
        "base": "someone/tiny",
        "license": "apache-2.0",
        "quantisation": describe_quantisation(model),
        "ogpsa": {"preset": "budget", "tau": 0.1},
        "data": {"safety": "embedded:safety_sft"},
        "evaluation": {"harmful refused": {"before": 0.11, "after": 0.983}},
    }
    (folder / "ogpsa_run.json").write_text(json.dumps(facts))
    return folder


def _export(adapter, output, **options):
    return export_merged(
        adapter, output, **{"progress": False, "prompts": PROMPTS, "answer_tokens": 4, **options}
    )


# -------------------------------------------------------------------------------- divergence


def test_divergence_against_definitions():
    reference = [torch.randn(5, 7), torch.randn(3, 7)]
    candidate = [r + 0.3 * torch.randn_like(r) for r in reference]
    found = divergence(reference, candidate)
    p, q = torch.cat(reference), torch.cat(candidate)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert found.positions == 8
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-4)
    assert found.max_logit_difference == pytest.approx((p - q).abs().max().item())
    assert found.relative_error == pytest.approx(((p - q).norm() / p.norm()).item(), rel=1e-5)
    assert found.top1_agreement == (p.argmax(1) == q.argmax(1)).float().mean()


def test_divergence_of_equal_logits_is_zero_and_mismatches_are_errors():
    logits = [torch.randn(4, 9)]
    same = divergence(logits, logits)
    assert (same.mean_kl, same.relative_error, same.top1_agreement) == (0, 0, 1)
    with pytest.raises(ValueError, match="shapes"):
        divergence(logits, [torch.randn(4, 8)])
    with pytest.raises(ValueError, match="no logits"):
        divergence([], [])


# ------------------------------------------------------------------------------ verification


def test_default_merge_of_a_qlora_adapter_is_verified_compared_and_described(qlora, tmp_path):
    result = _export(qlora, tmp_path / "out", dtype="float32")
    assert result.merge.strategy == "dequantised"
    checked, other = result.verification.comparisons
    assert checked.tolerance == REPRODUCES
    assert checked.result.relative_error < 1e-5
    assert other.candidate == "the other choice (original)"
    assert other.tolerance is None
    assert other.result.relative_error > 100 * checked.result.relative_error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["verification"]["comparisons"][0]["mean_kl"] == checked.result.mean_kl
    assert report["merge"]["quantisation"]["quant_type"] == "nf4"
    table = (tmp_path / "out" / "merge_report.md").read_text()
    assert "| merged (dequantised) | base in 4 bits + adapter, as trained |" in table
    assert f"3 prompts with the trained model's own greedy answers, {checked.result.positions}" in (
        table
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert "merged (dequantised)" in card.content


def test_numbers_agree_with_logits_computed_by_hand(qlora, tiny_tokenizer, tiny_4bit, tmp_path):
    _export(qlora, tmp_path / "out", verify=False, strategy="original")
    report = verify_merge(
        qlora,
        tmp_path / "out",
        strategy="original",
        quantisation=SETTINGS,
        prompts=["Pick a lock."],
        answer_tokens=3,
    )
    ids = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Pick a lock."}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tiny_tokenizer(ids)["input_ids"]])
    trained = PeftModel.from_pretrained(tiny_4bit(peft=False), qlora).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        while len(ids[0]) < report.comparisons[0].result.positions:
            ids = torch.cat([ids, trained(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = divergence([trained(ids).logits[0]], [merged(ids).logits[0].float()])
    found = report.comparisons[0].result
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)
    assert found.max_logit_difference == pytest.approx(expected.max_logit_difference, rel=1e-3)


def test_original_strategy_is_held_to_both_references(qlora, tmp_path):
    result = _export(qlora, tmp_path / "out", strategy="original", compare=False)
    trained, exact = result.verification.comparisons
    assert (trained.tolerance, exact.tolerance) == (SWAPPED_BASE, REPRODUCES)
    assert exact.result.relative_error < trained.result.relative_error


@pytest.mark.parametrize(
    ("given", "trained", "exact"),
    [
        ({"max_kl": 7.0}, Tolerance(7.0, 0.6), Tolerance(7.0, 0.9)),
        ({"min_top1": 0.25}, Tolerance(0.5, 0.25), Tolerance(0.02, 0.25)),
        (
            {"max_kl": 7.0, "tolerance": Tolerance(1.0, 0.1)},
            Tolerance(7.0, 0.1),
            Tolerance(7.0, 0.9),
        ),
    ],
)
def test_one_limit_leaves_the_other_as_it_was(given, trained, exact, qlora, tmp_path):
    result = _export(qlora, tmp_path / "out", strategy="original", compare=False, **given)
    assert [row.tolerance for row in result.verification.comparisons] == [trained, exact]


def test_models_are_in_memory_one_after_the_other(qlora, tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    loaded, alive = [], []

    def watched(*args, **options):
        alive.append(sum(model() is not None for model in loaded))
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    gc.disable()  # what only a chance collection would free still counts
    try:
        _export(qlora, tmp_path / "out", strategy="original")
    finally:
        gc.enable()
    # As trained, merged, original base + adapter, the other choice.
    assert alive == [0, 0, 0, 0]


def test_on_a_gpu_only_4_bit_models_must_fit_whole(qlora, tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    places = []

    def watched(*args, device_map, **options):
        places.append(device_map)
        return load(*args, device_map="cpu", **options)

    _export(qlora, tmp_path / "out", strategy="original", verify=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    verify_merge(
        qlora,
        tmp_path / "out",
        strategy="original",
        quantisation=SETTINGS,
        prompts=PROMPTS,
        device="cuda",
    )
    assert places == [{"": "cuda"}, "auto", "auto"]


@pytest.mark.parametrize(
    ("step", "advice"), [("verify_merge", "--no-verify"), ("merge_adapter", "--device cpu")]
)
def test_out_of_memory_says_what_helps_a_merge(step, advice, qlora, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"lora_ogpsa.export.pipeline.{step}", full)
    with pytest.raises(ExportError, match=f"^out of memory while .*{advice}"):
        _export(qlora, tmp_path / "out", compare=False)
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bit_adapter_needs_no_second_reference(tiny_folder, tiny_peft, tmp_path):
    tiny_peft(warm=True).save_pretrained(tmp_path / "adapter")
    result = _export(tmp_path / "adapter", tmp_path / "out", base=tiny_folder)
    assert [row.reference for row in result.verification.comparisons] == [
        "base + adapter, as trained"
    ]


def test_several_weighted_adapters_are_verified_against_peft(tiny_folder, tiny_peft, tmp_path):
    for seed in (1, 2):
        tiny_peft(warm=True, seed=seed).save_pretrained(tmp_path / f"a{seed}")
    pairs = [(tmp_path / "a1", 0.5), (tmp_path / "a2", 2.0)]
    result = _export(pairs, tmp_path / "out", base=tiny_folder, dtype="float32")
    assert result.verification.comparisons[0].result.relative_error < 1e-5


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}]
)
def test_a_strength_that_peft_cannot_run_is_refused_before_the_merge(
    kind, tiny_folder, tiny_peft, tmp_path
):
    tiny_peft(warm=True, **kind).save_pretrained(tmp_path / "adapter")
    output = tmp_path / "deep" / "out"
    for pairs in ([(tmp_path / "adapter", 0.5)], [(tmp_path / "adapter", 1.0)] * 2):
        with pytest.raises(ExportError, match=f"{next(iter(kind))}.* cannot be verified"):
            _export(pairs, output, base=tiny_folder)
        assert not output.parent.exists()  # a merge makes it
    assert _export(tmp_path / "adapter", output, base=tiny_folder).verification


def test_beyond_the_tolerance_nothing_is_published_and_the_error_says_why(qlora, tmp_path):
    with pytest.raises(ExportError, match=r"top-1 agreement .*at least 101%") as caught:
        _export(qlora, tmp_path / "out", tolerance=Tolerance(mean_kl=9, top1_agreement=1.01))
    assert "another base than in training" in str(caught.value)
    assert "| merged (dequantised) |" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_into_a_wrong_base_fails(qlora, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "wrong")
    _export(qlora, tmp_path / "out", base=tmp_path / "wrong", verify=False)
    report = verify_merge(qlora, tmp_path / "out", quantisation=SETTINGS, prompts=PROMPTS)
    assert "mean KL" in report.failures[0]
    with pytest.raises(ExportError, match="does not reproduce"):
        report.require_passed()


def test_a_merge_that_is_not_a_number_fails(qlora, tmp_path):
    _export(qlora, tmp_path / "out", verify=False, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "out")
    report = verify_merge(qlora, tmp_path / "out", quantisation=SETTINGS, prompts=PROMPTS)
    assert "mean KL nan" in report.failures[0]


def test_the_other_choice_is_left_out_where_the_disk_is_too_small(qlora, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=0 if ".compare-" in str(path) else usage.free),
    )
    result = _export(qlora, tmp_path / "out")
    assert len(result.verification.comparisons) == 1
    assert "was not measured: the merged model" in result.verification.notes[0]


def test_verification_needs_prompts_and_a_tokenizer(qlora, tiny_folder, tiny_peft, tmp_path):
    output = tmp_path / "deep" / "out"
    with pytest.raises(ExportError, match="no prompt"):
        _export(qlora, output, prompts=[])
    with pytest.raises(DataError, match="prompt 2: no user turn with text"):
        _export(qlora, output, prompts=["Hi", " "])
    base = tmp_path / "bare"
    shutil.copytree(tiny_folder, base)
    for file in base.glob("tokenizer*"):
        file.unlink()
    tiny_peft(warm=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match="bare has no tokenizer"):
        _export(tmp_path / "adapter", output, base=base)
    (base / "tokenizer.json").write_text('{"version": "none"}')
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ExportError, match="bare has no tokenizer that can be loaded") as caught:
        _export(tmp_path / "adapter", output, base=base)
    assert "\n" not in str(caught.value)
    assert not output.parent.exists()  # all of it before the merge, which makes the folder


def test_a_model_that_cannot_be_loaded_is_named(qlora, tmp_path):
    _export(qlora, tmp_path / "out", verify=False)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ExportError, match="transformers cannot load .*out, which") as caught:
        verify_merge(qlora, tmp_path / "out", quantisation=SETTINGS, prompts=PROMPTS)
    assert "\n" not in str(caught.value)


def test_prompts_are_rendered_as_in_training_without_thoughts(qlora, tmp_path):
    adapter = shutil.copytree(qlora, tmp_path / "adapter")
    template = (
        "{% if enable_thinking is not defined or enable_thinking %}"
        "{{ raise_exception('it would think') }}{% endif %}{{ messages[0]['content'] }}"
    )
    (adapter / "chat_template.jinja").write_text(template)
    assert not _export(adapter, tmp_path / "out").verification.failures
    with pytest.raises(DataError, match="prompt 2: no user turn"):
        _export(adapter, tmp_path / "other", prompts=["a", " "])


def test_the_adapter_stays_a_plain_peft_adapter(qlora, tiny_folder, tmp_path):
    before = {p.name: p.read_bytes() for p in qlora.iterdir()}
    _export(qlora, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in qlora.iterdir()} == before
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), qlora)
    assert model.peft_config["default"].peft_type == "LORA"


# ------------------------------------------------------------------------------- model card


def _metadata(path: Path) -> dict:
    return yaml.safe_load(path.read_text().split("---")[1])


def test_card_has_the_hubs_metadata_and_the_runs_facts(qlora, tmp_path):
    result = _export(qlora, tmp_path / "merged-model", compare=False)
    path = tmp_path / "merged-model" / "README.md"
    metadata = _metadata(path)
    assert metadata["base_model"] == "someone/tiny"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0"
    assert {"lora-ogpsa", "safety-alignment"} <= set(metadata["tags"])
    text = path.read_text()
    assert "aligned for safety with lora_ogpsa" in text
    assert "# merged-model\n" in text
    assert "| preset | budget |" in text
    assert "| harmful refused | 0.11 | 0.983 |" in text
    assert "| peft | " in text
    assert result.verification.to_markdown() in text


def test_card_of_an_adapter_and_of_a_local_base(qlora, tmp_path):
    shutil.copytree(qlora, tmp_path / "adapter")
    path = write_model_card(tmp_path / "adapter", {"base": "embedded", "data": "two|\nlines"})
    metadata = _metadata(path)
    assert metadata["library_name"] == "peft"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for folder in (str(tmp_path), "/another/machines/folder", "../model"):
        path = write_model_card(tmp_path / "adapter", {"base": folder})
        assert "base_model" not in _metadata(path)
    with pytest.raises(ExportError, match="exists"):
        write_model_card(tmp_path / "adapter", {}, overwrite=False)


@pytest.mark.parametrize("facts", [{}, {"ogpsa": None, "training": {"trainer": "sft"}}])
def test_card_claims_alignment_only_for_a_training_with_ogpsa(facts, qlora, tmp_path):
    result = _export(qlora, tmp_path / "merged", compare=False, verify=False, facts=facts)
    shutil.copytree(qlora, tmp_path / "adapter")
    write_model_card(tmp_path / "adapter", facts)
    for name in ("merged", "adapter"):
        path = tmp_path / name / "README.md"
        assert "lora-ogpsa" in _metadata(path)["tags"]
        assert "safety-alignment" not in _metadata(path)["tags"]
        assert "aligned" not in path.read_text() and "OGPSA" not in path.read_text()
    text = (tmp_path / "merged" / "README.md").read_text()
    assert f"A fine-tune of {result.merge.base}. Merged with lora_ogpsa." in text


def test_card_leaves_out_what_is_not_true_of_another_strength_or_a_mixture(qlora, tmp_path):
    quick = {"compare": False, "verify": False}
    _export([(qlora, 0.5)], tmp_path / "weaker", **quick)
    text = (tmp_path / "weaker" / "README.md").read_text()
    assert "| preset | budget |" in text and "harmful refused" not in text
    assert "- What was applied: 0.5 times the change of adapter.\n" in text
    assert "What was applied" in (tmp_path / "weaker" / "merge_report.md").read_text()
    _export([(qlora, 0.5), (qlora, 0.5)], tmp_path / "mixture", **quick)
    path = tmp_path / "mixture" / "README.md"
    assert _metadata(path)["base_model"] == "someone/tiny"
    assert "safety-alignment" not in _metadata(path)["tags"]
    assert "aligned" not in path.read_text() and "harmful refused" not in path.read_text()
    twice = "0.5 times the change of adapter, 0.5 times the change of adapter."
    assert f"What was applied: {twice}" in path.read_text()


def test_card_table_cells_cannot_break_the_table(qlora, tmp_path):
    shutil.copytree(qlora, tmp_path / "adapter")
    path = write_model_card(tmp_path / "adapter", {"training": {"note": "a|b\nc", "lr": 0.0005}})
    assert "| note | a\\|b c |\n| lr | 0.0005 |" in path.read_text()


# ------------------------------------------------------------------------------------- hub


def test_push_makes_the_repository_and_uploads_the_folder(qlora, monkeypatch):
    calls = []

    class Commit:
        commit_url = "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **k: calls.append((self.token, k)) or Commit
    )
    assert push_to_hub(qlora, "me/model", token="secret") == "https://hub/commit"
    assert calls[0] == (("me/model",), {"private": True, "exist_ok": True})
    assert calls[1][0] == "secret"
    assert calls[1][1]["repo_id"] == "me/model"
    assert calls[1][1]["folder_path"] == qlora
    assert calls[1][1]["ignore_patterns"] == ["merge_report.*"]


def test_push_failures_are_explained(qlora, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="neither a model nor an adapter"):
        push_to_hub(tmp_path, "me/model")

    def refuse(self, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ExportError, match=r"no route.*token may write"):
        push_to_hub(qlora, "me/model")


def test_importing_the_export_is_light():
    code = "import sys, lora_ogpsa.export; print(sorted({'torch', 'peft'} & set(sys.modules)))"
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
