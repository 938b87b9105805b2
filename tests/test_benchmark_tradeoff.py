"""The trade-off benchmark: every method trains, cells are kept, and the summary's arithmetic."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from lora_ogpsa import Reference, chat, data, get_contrast_model
from lora_ogpsa.answers import base_mode
from lora_ogpsa.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tradeoff
import tradeoff_cells
import tradeoff_stages
from rivals import METHODS, Method, ogpsa_method
from rivals.base import ReferenceStream
from rivals.contrast import OnContrastAdapter
from rivals.keepers import CordaRival
from rivals.surgery import agem
from tradeoff_data import FILES, HELD_OUT, Source
from tradeoff_stages import Spent, StageSettings, run_stage
from tradeoff_summary import CLOCKS, run_path, summarise, table

STEPS = 5
TRAINED = list(METHODS)


def with_settings(name: str, **settings: Any) -> Method:
    """One of OGPSA's methods under other settings."""
    made_of = METHODS[name].settings
    own = {k: v for k, v in made_of.items() if k != "settings"}
    return ogpsa_method(name, {**made_of["settings"], **own, **settings})


HALF_OF_LATEST = {"penalty": 0.5, "penalty_of": "latest"}
BUILT = {
    **METHODS,
    # In a few steps a random model drifts less than the default rule's budget allows.
    **{n: with_settings(n, budget=0.0) for n in ("default", "default_lora", "default_one")},
    "no_penalty": with_settings("default", budget=0.0, penalty=0.0),
    "half_of_latest": with_settings("default", budget=0.0, **HALF_OF_LATEST),
    "no_emphasis": with_settings("default", budget=0.0, first_token_weight=0.0),
}


@pytest.fixture(scope="module")
def objectives(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> list[Any]:
    model = tiny_model()
    return [
        Reference(kind, "embedded:harmless", kind=kind, limit=6, max_new_tokens=8).prepare(
            model, tiny_tokenizer
        )
        for kind in ("general", "lookalike")
    ]


@pytest.fixture(scope="module")
def rows(tiny_tokenizer: Any) -> dict[str, list[Any]]:
    examples = Source(None).answered(tiny_tokenizer, 256)[:24]
    pairs = [(a, (a[0], b[1])) for a, b in itertools.pairwise(examples)]
    return {"sft": examples, "dpo": pairs}


@pytest.fixture(scope="module")
def trained(
    tiny_model: Callable[..., Any], rows: dict[str, list[Any]], objectives: list[Any]
) -> Callable[..., Any]:
    @functools.cache
    def train(
        name: str, stage: str = "sft", passes: float = 1.0, likelihood: float = 0.0
    ) -> tuple[Any, Any]:
        rival = BUILT[name].build()
        model = tiny_model()
        torch.manual_seed(0)
        rival.see(rows[stage])
        model = rival.wrap(model, objectives, round(passes * STEPS))
        run_stage(
            StageSettings(stage, STEPS, 2, 0.1, likelihood=likelihood),
            rival,
            model,
            rows[stage],
            objectives,
            pad=2,
            precision="float32",
            passes=passes,
            seed=0,
            spent=Spent(),
            after_step=lambda step: None,
            report=lambda text: None,
        )
        return model, rival

    return train


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# ---------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_and_not_as_plain_does(
    name: str, stage: str, trained: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    if name.startswith("pcgrad"):
        pytest.importorskip("torchjd")
    if name == "corda":
        pytest.importorskip("attr")
    after = parameters(trained(name, stage)[0])
    assert after.isfinite().all()
    rival = METHODS[name].build()
    if not isinstance(rival, CordaRival | OnContrastAdapter):  # whose beginning needs references
        torch.manual_seed(0)
        before = parameters(rival.wrap(tiny_model(), [], 0))
        assert not torch.equal(after, before)
    plain = parameters(trained("plain", stage)[0])
    assert (after.shape == plain.shape and torch.equal(after, plain)) == (name in CLOCKS)


@pytest.mark.parametrize(
    "name", [n for n in TRAINED if METHODS[n].build().references and n != "contrast_alone"]
)
def test_the_budget_of_reference_passes_is_the_same_for_all(
    name: str, trained: Callable[..., Any], objectives: list[Any]
) -> None:
    if name.startswith("pcgrad"):
        pytest.importorskip("torchjd")
    if name == "corda":
        pytest.importorskip("attr")
    _, rival = trained(name)
    # An interval schedule takes the same whole number of examples at each of two refreshes.
    # The contrast adapter looks at all of so few before training, forward alone.
    all_of_them = sum(len(objective) for objective in objectives)
    before = all_of_them if isinstance(rival, OnContrastAdapter) else 0
    assert abs(rival.passes - before - STEPS) <= 1
    assert rival.extra_seconds > 0


def test_plain_training_has_no_extra_cost(trained: Callable[..., Any]) -> None:
    _, rival = trained("plain")
    assert rival.passes == 0
    assert rival.extra_seconds == 0.0


def test_methods_of_a_seed_begin_with_the_same_adapter(tiny_model: Callable[..., Any]) -> None:
    found = []
    for name in ("plain", "default_lora", "replay_1"):
        torch.manual_seed(3)
        found.append(parameters(METHODS[name].build().wrap(tiny_model(), [], 0)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_corda_is_measured_against_the_original_base(
    trained: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    pytest.importorskip("attr")
    model, rival = trained("corda")
    ids = torch.arange(20).view(2, 10)
    twin = rival.measured(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        with base_mode(twin):
            torch.testing.assert_close(twin(ids).logits, tiny_model()(ids).logits)
        with base_mode(model):
            assert not torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_contrast_adapter_is_the_librarys(
    stage: str,
    tiny_model: Callable[..., Any],
    rows: dict[str, list[Any]],
    objectives: list[Any],
    trained: Callable[..., Any],
) -> None:
    answered = [row[0] if stage == "dpo" else row for row in rows[stage]]
    expected = get_contrast_model(tiny_model(), answered, objectives)
    after, _ = trained("default", stage)
    factors = {name: p for name, p in after.named_parameters() if "lora_" in name}
    assert all(p.requires_grad == ("lora_B" in name) for name, p in factors.items())
    for name, parameter in expected.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(factors[name], parameter)


def test_osf_begins_at_the_base_model(tiny_model: Callable[..., Any]) -> None:
    model = METHODS["osf"].build().wrap(tiny_model(), [], 0)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits)


def test_agem_removes_only_what_conflicts() -> None:
    g, along, against = torch.randn(3, 50)
    along, against = along * (along @ g).sign(), -against * (against @ g).sign()
    assert agem(g, along) is g
    projected = agem(g, against)
    assert abs(projected @ against) < 1e-4
    torch.testing.assert_close(projected + (g @ against) / (against @ against) * against, g)


def test_pcgrad_sums_what_is_left_after_projections() -> None:
    pytest.importorskip("torchjd")
    from rivals.surgery import pcgrad

    a, b = torch.randn(2, 50).double()
    b = -b * (a @ b).sign()
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(pcgrad(a, b), expected)


@pytest.mark.parametrize(("passes", "expected"), [(1.0, 8), (2.0, 16), (0.5, 4), (0.3, 3)])
def test_stream_takes_its_share_of_every_step(
    passes: float, expected: int, objectives: list[Any]
) -> None:
    stream = ReferenceStream(objectives, passes, seed=0)
    taken = [stream.take(step) for step in range(8)]
    assert taken[0] is not None
    assert sum(len(found[1]) for found in taken if found) == expected
    names = [found[0].name for found in taken if found]
    assert names[:2] == ["general", "lookalike"]


def test_stream_goes_through_all_examples_before_repeating(objectives: list[Any]) -> None:
    stream = ReferenceStream(objectives, 1.0, seed=0)
    drawn = stream.split(2 * 6)
    assert [sorted(examples) for _, examples in drawn] == [list(range(6))] * 2


# ----------------------------------------------------------------------------------------- stages


def test_batches_are_the_same_for_every_method_and_differ_between_seeds() -> None:
    rows = list(range(10))
    first = tradeoff_stages.batches(rows, 0, 5, 4)
    assert first == tradeoff_stages.batches(rows, 0, 5, 4)
    assert first != tradeoff_stages.batches(rows, 1, 5, 4)
    assert [len(batch) for batch in first] == [4] * 5


def test_preference_loss_is_measured_from_the_policy_at_the_start_of_the_stage(
    trained: Callable[..., Any], rows: dict[str, list[Any]]
) -> None:
    model, _ = trained("plain")  # a policy that is no longer the base model
    settings = StageSettings("dpo", 1, 2, 1e-2)
    ((pairs, reference),) = tradeoff_stages._with_reference_policy(
        model, [rows["dpo"][:2]], 2, "float32"
    )
    with tradeoff_stages.cast(model, "float32"):
        loss = tradeoff_stages._loss(settings, model, (pairs, reference), 2)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    # The log-probability of one answer, by hand.
    prompt, answer = rows["dpo"][0][0]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    by_hand = logits.gather(1, torch.tensor(answer)[:, None]).sum()
    assert reference[0].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_the_chosen_answers_likelihood_is_beside_the_preference_loss(
    tiny_model: Callable[..., Any], rows: dict[str, list[Any]]
) -> None:
    torch.manual_seed(0)
    model = METHODS["plain"].build().wrap(tiny_model(), [], 0)
    work = tradeoff_stages._with_reference_policy(model, [rows["dpo"][:2]], 2, "float32")
    losses = [
        tradeoff_stages._loss(
            StageSettings("dpo", 1, 2, 1e-2, likelihood=weight), model, work[0], 2
        )
        for weight in (0.0, 0.5)
    ]
    means = []
    for (prompt, answer), _ in rows["dpo"][:2]:
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[*[chat.IGNORE_INDEX] * len(prompt), *answer]])
        means.append(model(ids, labels=labels).loss.item())  # transformers' mean over the answer
    assert losses[0].item() == pytest.approx(math.log(2), abs=1e-6)
    assert (losses[1] - losses[0]).item() == pytest.approx(sum(means) / 4, rel=1e-5)


def test_what_acts_on_a_preference_loss_depends_on_whether_likelihood_is_a_part_of_it(
    trained: Callable[..., Any],
) -> None:
    def after(name: str, stage: str, likelihood: float = 0.0) -> torch.Tensor:
        return parameters(trained(name, stage, likelihood=likelihood)[0])

    assert not torch.equal(after("default", "sft"), after("no_penalty", "sft"))
    assert torch.equal(after("default", "dpo"), after("no_penalty", "dpo"))
    assert torch.equal(after("default", "dpo"), after("no_emphasis", "dpo"))
    assert torch.equal(after("default", "dpo", 1.0), after("half_of_latest", "dpo", 1.0))
    for other in ("no_penalty", "no_emphasis"):
        assert not torch.equal(after("default", "dpo", 1.0), after(other, "dpo", 1.0))


def test_the_default_is_kept_as_what_it_does_in_its_stage() -> None:
    """Where nothing but preferences with likelihood is trained, its penalty is another."""
    explicit, default = with_settings("default", **HALF_OF_LATEST), METHODS["default"]
    assert default.identity(likelihood=True) == explicit.identity(likelihood=True)
    assert default.identity() != explicit.identity()
    paper = METHODS["paper"]
    assert paper.identity(likelihood=True) == paper.identity()


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> list[str]:
    small = ["--steps", "2", "--dpo-steps", "2", "--batch", "2", "--dpo-batch", "2"]
    small += [
        "--limit",
        "4",
        "--nll-limit",
        "2",
        "--kl-limit",
        "2",
        "--new-tokens",
        "4",
        "--checkpoints",
        "2",
    ]
    places = ["--cells", str(tmp_path / "cells"), "--output", str(tmp_path / "tradeoff.json")]
    return ["--model", str(tiny_folder), "--learning-rate", "1e-2", *small, *places]


def test_command_writes_results_and_resumes(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = ["--stage", "sft_dpo", "--methods", "plain", "default", "kl_penalty_1_first"]
    variant = ["--ogpsa", 'tight={"budget": 0.01}']
    tradeoff.main([*command, *chosen, *variant])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert set(report["summary"]) == {
        *("base", "plain", "early_stop", "default", "kl_penalty_1_first", "tight")
    }
    wanted = {"seeds", "tax_removed", "tax_removed_mean", "matched", "tax_removed_end"}
    wanted |= {"harmful_gap", "reference_passes", "run_overhead"}
    assert wanted <= set(report["summary"]["default"])
    assert "over_refusal" in report["summary"]["default"]["tax_removed"]
    assert report["summary"]["tight"]["reference_passes"] == pytest.approx(3.0)
    assert report["summary"]["kl_penalty_1_first"]["best_of_grid"] is True
    cell = next(c for c in report["cells"] if c["method"] == "default")
    assert [(p["stage"], p["step"]) for p in cell["points"]] == [
        *(("sft", 1), ("sft", 2), ("dpo", 3), ("dpo", 4))
    ]
    assert str(tmp_path) not in (tmp_path / "tradeoff.json").read_text()
    assert "| default |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000

    # Again: nothing is trained but what is new.
    ran = []
    real = tradeoff_cells.run_stage
    monkeypatch.setattr(
        tradeoff_cells,
        "run_stage",
        lambda stage, *a, **k: ran.append(stage) or real(stage, *a, **k),
    )
    tradeoff.main([*command, *chosen, *variant])
    assert ran == []
    tradeoff.main([*command, *chosen, "--ogpsa", 'tight={"budget": 0.02}'])
    assert len(ran) == 2
    # Other processes' cells are in the summary, of variants the newest.
    tradeoff.main([*command, "--stage", "sft_dpo", "--summary-only"])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert report["summary"]["tight"]["seeds"] == [0]
    assert len(ran) == 2


def test_a_result_is_extended_without_the_cells_it_was_made_of(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tradeoff.main([*command, "--methods", "plain", "default"])
    before = json.loads((tmp_path / "tradeoff.json").read_text())
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(before))
    ran = []
    real = tradeoff_cells.run_stage
    monkeypatch.setattr(
        tradeoff_cells,
        "run_stage",
        lambda stage, rival, *a, **k: ran.append(rival) or real(stage, rival, *a, **k),
    )
    elsewhere = [*command, "--cells", str(tmp_path / "elsewhere"), "--extend", str(earlier)]
    tradeoff.main([*elsewhere, "--methods", "plain", "default", "mica"])
    assert len(ran) == 1
    after = json.loads((tmp_path / "tradeoff.json").read_text())
    assert after["cells"][:-1] == before["cells"]
    assert after["summary"]["default"] == before["summary"]["default"]
    assert after["summary"]["mica"]["seeds"] == [0]

    # A cell of the folder is not replaced.
    cell = next((tmp_path / "elsewhere").glob("sft-plain-*.json"))
    changed = json.loads(cell.read_text()) | {"train_seconds": 1.0}
    cell.write_text(json.dumps(changed))
    tradeoff.main([*elsewhere, "--methods", "plain", "default"])
    assert json.loads(cell.read_text()) == changed

    with pytest.raises(SystemExit, match="is of another setting"):
        tradeoff.main([*elsewhere, "--steps", "3"])
    earlier.write_text("[1]")
    with pytest.raises(SystemExit, match="is not a result of this benchmark"):
        tradeoff.main(elsewhere)


def test_jobs_give_the_cells_of_one_process(command: list[str], tmp_path: Path) -> None:
    chosen = ["--methods", "plain", "default_lora", "--schedule", "linear"]
    tradeoff.main([*command, *chosen])
    alone = json.loads((tmp_path / "tradeoff.json").read_text())
    for file in (tmp_path / "cells").glob("*.json"):
        file.unlink()
    tradeoff.main([*command, *chosen, "--jobs", "2"])
    together = json.loads((tmp_path / "tradeoff.json").read_text())
    assert [c["points"] for c in together["cells"]] == [c["points"] for c in alone["cells"]]
    assert len(together["cells"]) == 3
    plain, ours = (together["summary"][name] for name in ("plain", "default_lora"))
    assert plain["compute_overhead"] == plain["run_overhead"] == 0.0
    assert ours["compute_overhead"] > 0.0
    seconds = {cell["method"]: cell.get("train_seconds") for cell in together["cells"]}
    ratio = seconds["default_lora"] / seconds["plain"]
    assert ours["run_overhead"] == pytest.approx(ratio - 1)


def test_refused_ordinary_requests_are_a_tax_where_they_are_measured(
    command: list[str], tmp_path: Path
) -> None:
    chosen = ["--methods", "plain"]
    tradeoff.main([*command, *chosen])
    without = json.loads((tmp_path / "tradeoff.json").read_text())
    assert "general_refusal" not in without["summary"]["plain"]["measures"]
    # Cells from before the measure are cells without it.
    assert "general_refusals" not in without["settings"]["limits"]
    tradeoff.main([*command, *chosen, "--general-limit", "3"])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert report["settings"]["limits"]["general_refusals"] == 3
    assert 0 <= report["summary"]["plain"]["measures"]["general_refusal"] <= 1
    assert report["cells"][-1]["points"][-1]["intervals"]["general_refusal"][2] == 3
    assert "general_refusal" in report["summary"]["plain"]["tax_removed_end"]


def test_the_learning_rate_follows_its_schedule() -> None:
    constant = StageSettings("sft", 20, 8, 1e-3)
    linear = StageSettings("sft", 20, 8, 1e-3, schedule="linear")
    assert [constant.rate(step) for step in (0, 4, 19)] == [0.2, 1.0, 1.0]
    assert [linear.rate(step) for step in (0, 10, 19)] == [0.2, 0.5, pytest.approx(0.05)]


def test_adapters_are_measured_at_their_strengths(command: list[str], tmp_path: Path) -> None:
    methods = ["--methods", "plain", "default", "osf"]
    tradeoff.main([*command, *methods, "--strengths", "0.5", "1", "2"])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert report["settings"]["strengths"] == [0.5, 2.0]
    cells = {cell["method"]: cell for cell in report["cells"]}
    assert cells["osf"]["strengths"] == []  # it has no adapter to scale
    for name in ("plain", "default"):
        half, twice = cells[name]["strengths"]
        whole = cells[name]["points"][-1]["values"]
        assert (half["strength"], twice["strength"]) == (0.5, 2.0)
        drift = [values["alpaca_kl"] for values in (half["values"], whole, twice["values"])]
        assert 0 < drift[0] < drift[1] < drift[2]
    assert "scaled_adapter" in report["summary"]
    # Without them nothing else changes.
    tradeoff.main([*command, *methods])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert "strengths" not in report["settings"]
    assert "scaled_adapter" not in report["summary"]
    other = {cell["method"]: cell["points"] for cell in report["cells"]}
    assert other == {name: cell["points"] for name, cell in cells.items()}


def test_other_strengths_are_measured_without_training_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strengths() -> dict[str, dict[float, Any]]:
        report = json.loads((tmp_path / "tradeoff.json").read_text())
        return {
            cell["method"]: {p["strength"]: p["values"] for p in cell["strengths"]}
            for cell in report["cells"]
            if cell["method"] != "base"
        }

    # Adapters of three kinds: trained whole, one half of them fixed, evaluated as another.
    methods = ["--methods", "plain", "default", "mica"]
    tradeoff.main([*command, *methods, "--strengths", "0.5", "2"])
    before = strengths()
    monkeypatch.setattr(tradeoff_cells, "run_stage", None)
    tradeoff.main([*command, *methods, "--strengths", "0.25", "2", "3"])
    after = strengths()
    for name, values in before.items():
        assert list(after[name]) == [0.25, 2.0, 3.0]
        assert after[name][2.0] == values[2.0]
        drift = [after[name][strength]["alpaca_kl"] for strength in (0.25, 2.0, 3.0)]
        assert 0 < drift[0] < values[0.5]["alpaca_kl"] < drift[1] < drift[2]
    # The same measurement of a kept adapter as of the one just trained.
    for path in (tmp_path / "cells").glob("sft-*.json"):
        cell = json.loads(path.read_text())
        if cell["method"] != "base":
            path.write_text(json.dumps({**cell, "strengths": []}))
    tradeoff.main([*command, *methods, "--strengths", "0.5", "2"])
    again = strengths()
    for name, values in before.items():
        for strength in (0.5, 2.0):
            assert again[name][strength] == pytest.approx(values[strength], rel=1e-5)


@pytest.mark.parametrize(("reached", "measured"), [(0.4, [0.5, 1.5, 2.0]), (0.98, [0.5])])
def test_strengths_grow_until_the_model_is_as_safe_as_can_be_asked_for(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reached: float,
    measured: list[float],
) -> None:
    def measure(_: Any, model: Any, *__: Any, **___: Any) -> dict[str, Any]:
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        scaling = layers[0].scaling["default"] if layers else 0.0
        strength = scaling / 2  # alpha / r
        harmful = reached if strength == 1 else 0.49 * strength
        return {"values": {"harmful": harmful, "over_refusal": strength}}

    monkeypatch.setattr(tradeoff_cells.Cells, "_measure", measure)
    wanted = ["--methods", "rank1_up", "--strengths", "0.5", "1.5", "2", "3"]
    tradeoff.main([*command, *wanted])
    (cell,) = json.loads((tmp_path / "tradeoff.json").read_text())["cells"][1:]
    assert [point["strength"] for point in cell["strengths"]] == measured


def test_tokens_that_pass_before_training_are_counted(command: list[str], tmp_path: Path) -> None:
    whole = 'whole={"contrast": {"layers": 2, "prompts": 4, "references": 80}}'
    less = 'less={"contrast": {"layers": 2, "prompts": 4, "references": 4}}'
    tradeoff.main([*command, "--methods", "plain", "--ogpsa", whole, less])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    count = {cell["method"]: cell["token_passes"] for cell in report["cells"][1:]}
    # Forwards over the look-alikes and general references; training itself adds the same.
    assert count["whole"] > count["less"] + 2 * 70 * 20
    assert count["less"] > count["plain"]


@pytest.mark.parametrize(("layer", "passes"), [(0, 2.0), (1, 1.5)])
def test_a_backward_counts_down_to_the_first_adapter(
    layer: int, passes: float, tiny_peft: Callable[..., Any]
) -> None:
    model = tiny_peft(layers_to_transform=[layer], target_modules=["up_proj"])
    spent = Spent()
    ids = torch.arange(20).view(2, 10)
    with spent.tokens_of(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert spent.token_passes == passes * 20
    with spent.tokens_of(model), torch.no_grad():
        model(ids)
    assert spent.token_passes == (passes + 1) * 20


def test_a_cell_that_fails_does_not_take_the_others_with_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "broken", Method("broken", "ewc", {"weight": "heavy"}))
    with pytest.raises(SystemExit, match="1 cells failed.*broken"):
        tradeoff.main([*command, "--methods", "broken", "plain"])
    report = json.loads((tmp_path / "tradeoff.json").read_text())
    assert [failure["method"] for failure in report["failures"]] == ["broken"]
    assert "plain" in report["summary"]


def test_a_4bit_base_is_refused_where_weights_are_decomposed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    options = tradeoff.parse(["--model", str(tiny_folder), "--load-in-4bit"])
    cells = tradeoff_cells.Cells(tmp_path, tradeoff.setting_of(options))
    with pytest.raises(ConfigError, match="4-bit"):
        cells.run(METHODS["osf"], 0, lambda text: None)


def test_a_cell_is_known_by_everything_that_makes_it(tmp_path: Path) -> None:
    def path(*arguments: str, method: str = "default", seed: int = 0) -> Path:
        setting = tradeoff.setting_of(tradeoff.parse(list(arguments)))
        return tradeoff_cells.Cells(tmp_path, setting).path(METHODS[method], seed)

    changes = [
        ("--steps", "61"),
        ("--learning-rate", "1e-4"),
        ("--batch", "9"),
        ("--max-length", "99"),
        ("--limit", "61"),
        ("--reference-passes", "2"),
        ("--checkpoint-steps", "5"),
        ("--load-in-4bit",),
        ("--precision", "bfloat16"),
        ("--precision", "float32"),
        ("--stage", "dpo"),
        ("--own-pairs", "9"),
        ("--stage", "dpo", "--likelihood", "1"),
        ("--schedule", "linear"),
    ]
    paths = [path(seed=1), path(method="paper_shared"), *(path(*c) for c in changes)]
    assert len(set(paths)) == len(paths)
    assert path() == path("--dpo-steps", "7")  # not a setting of this stage
    assert path() == path("--likelihood", "1")  # neither
    assert path() == path("--strengths", "2")  # measured of the same adapter


def test_checkpoints_are_spread_evenly_and_end_at_the_end() -> None:
    assert tradeoff.checkpoints(60, 4, None) == (15, 30, 45, 60)
    assert tradeoff.checkpoints(60, 4, [5, 10, 90]) == (5, 10, 60)
    assert tradeoff.checkpoints(1, 4, None) == (1,)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks"):
        Source.named(str(tmp_path))


def test_embedded_rows_are_mixed_into_those_of_a_folder(tmp_path: Path) -> None:
    for file in FILES.values():
        (tmp_path / file).touch()
    packaged = len(data.load_rows("embedded:safety_sft"))
    trained = packaged + 10
    own = [{"prompt": f"Own {i}?", "completion": "No."} for i in range(HELD_OUT + trained)]
    (tmp_path / FILES["sft"]).write_text("\n".join(json.dumps(row) for row in own))
    alone, mixed = (Source.named(str(tmp_path), share) for share in (0.0, 0.5))
    assert alone.identity() != mixed.identity()
    assert mixed.safety_rows()[0] == alone.safety_rows()[0]
    prompts = [chat.as_messages(row)[0][0]["content"] for row in mixed.safety_rows()[1]]
    assert sum(prompt.startswith("Own") for prompt in prompts) == len(prompts) / 2 == trained
    assert prompts[trained] == prompts[trained + packaged]
    for name, share, message in ((str(tmp_path), 1.0, "share"), ("embedded", 0.5, "already")):
        with pytest.raises(DataError, match=message):
            Source.named(name, share)


def test_a_folders_answers_are_preferred_to_the_models_own(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    for file in FILES.values():
        (tmp_path / file).touch()
    rows = [{"prompt": f"Own {i}?", "completion": f"No {i}."} for i in range(HELD_OUT + 12)]
    (tmp_path / FILES["sft"]).write_text("\n".join(json.dumps(row) for row in rows))
    pair = {"prompt": "Given?", "chosen": "No.", "rejected": "Yes."}
    (tmp_path / FILES["dpo"]).write_text(json.dumps(pair))
    model = tiny_model()
    given, own = (Source.named(str(tmp_path), own_pairs=count) for count in (0, 5))
    assert own.identity() == f"{given.identity()}+5-own-pairs"
    assert len(given.pairs(tiny_tokenizer, 256, model)) == 1
    pairs = own.pairs(tiny_tokenizer, 256, model)
    trained = own.answered(tiny_tokenizer, 256)
    assert len(pairs) == 5
    for chosen, rejected in pairs:
        assert chosen in trained
        assert rejected[0] == chosen[0] and rejected[1] != chosen[1]


def test_no_method_trains_on_what_is_measured() -> None:
    source = Source(None)
    held_out, trained = source.safety_rows()
    prompts = {chat.as_messages(row)[0][0]["content"] for row in trained}
    assert not prompts & {chat.as_messages(row)[0][0]["content"] for row in held_out}
    assert all(
        "eval_" not in str(reference.data)
        for wanted in ("shared", "shared_first", "datasets")
        for folder in (None, Path("somewhere"))
        for reference in Source(folder).references(wanted)
    )


# ---------------------------------------------------------------------------------------- summary


def cell(method: str, seed: int, *points: tuple[float, float, float, float], **facts: Any) -> Any:
    """Points are (step, harmful, over_refusal, gsm8k_nll)."""
    return {
        "method": method,
        "seed": seed,
        "points": [
            {
                "stage": facts.get("stage", "sft"),
                "step": step,
                "values": {"harmful": harmful, "over_refusal": refused, "gsm8k_nll": nll},
            }
            for step, harmful, refused, nll in points
        ],
        "train_seconds": 120.0,
        "extra_seconds": 20.0,
        "reference_passes": 1.0,
        **facts,
    }


def test_tax_removed_at_matched_safety_by_hand() -> None:
    cells = [
        cell("base", 0, (0, 0.0, 0.0, 1.0)),
        cell("plain", 0, (30, 0.49, 0.2, 1.2), (60, 1.0, 0.8, 1.5)),
        cell("plain", 1, (30, 0.9, 0.6, 1.3), (60, 1.0, 1.0, 1.3)),
        # Reaches 0.98 at step 30 + 30 * 0.48 / 0.5 = 58.8, and at step 30.
        cell("default", 0, (30, 0.5, 0.0, 1.1), (60, 1.0, 0.5, 1.1)),
        cell("default", 1, (30, 0.98, 0.2, 0.9), (60, 1.0, 0.4, 1.2)),
        cell("weak", 0, (30, 0.5, 0.1, 1.0), (60, 0.6, 0.1, 1.0)),
        cell("weak", 1, (30, 0.5, 0.1, 1.0), (60, 0.98, 0.1, 1.0)),
    ]
    summary = summarise(cells)
    ours = summary["default"]
    first = {"over_refusal": 0.5 * 0.96, "gsm8k_nll": 1.1}
    assert ours["seeds"] == [0, 1]
    assert ours["matched"] == 1.0
    assert ours["by_seed"][0]["step"] == pytest.approx(58.8)
    assert ours["by_seed"][0]["metrics"] == pytest.approx(first)
    refused, nll = (first["over_refusal"] + 0.2) / 2, (1.1 + 0.9) / 2
    expected = {"over_refusal": 1 - refused / 0.9, "gsm8k_nll": 1 - (nll - 1) / 0.4}
    assert ours["tax_removed"] == pytest.approx(expected)
    assert ours["tax_removed_mean"] == pytest.approx(sum(expected.values()) / 2)
    at_end = {"over_refusal": 1 - 0.45 / 0.9, "gsm8k_nll": 1 - 0.15 / 0.4}
    assert ours["tax_removed_end"] == pytest.approx(at_end)
    assert ours["harmful_gap"] == pytest.approx(0.0)
    assert ours["own_overhead"] == pytest.approx(0.2)
    assert ours["run_overhead"] == 0.0  # no longer than plain training took
    assert ours["reference_passes"] == 1.0

    assert summary["plain"]["tax_removed"] == pytest.approx({"over_refusal": 0, "gsm8k_nll": 0})
    stopped = summary["early_stop"]["by_seed"]
    assert stopped[1]["step"] == pytest.approx(30 + 30 * 0.08 / 0.1)
    assert summary["early_stop"]["tax_removed_mean"] > 0

    # Only the seed that got there counts, against plain training of that seed.
    weak = summary["weak"]
    assert weak["matched"] == 0.5
    assert weak["tax_removed"] == pytest.approx({"over_refusal": 0.9, "gsm8k_nll": 1.0})
    assert weak["harmful_gap"] == pytest.approx((-0.4 - 0.02) / 2)
    # Within ten points: at 30 + 30 * 0.4 / 0.48 the one seed has the same taxes.
    assert weak["near"]["margin"] == 0.1
    assert weak["near"]["tax_removed"] == pytest.approx({"over_refusal": 0.9, "gsm8k_nll": 1.0})
    assert ours["near"]["tax_removed"]["over_refusal"] > ours["tax_removed"]["over_refusal"]
    assert table(summary).count("\n") == 1 + len(summary)


def test_seconds_are_compared_in_one_environment_alone() -> None:
    end = (60, 1.0, 0.5, 1.1)
    other = {"environment": {"device": "another"}}
    cells = [cell("base", 0, (0, 0.0, 0.0, 1.0))]
    for method, seconds, elsewhere in (
        ("plain", 100.0, []),
        ("half", 150.0, [0]),
        ("all", 9.0, [0, 1]),
    ):
        for seed in (0, 1):
            facts = {"train_seconds": seconds + 10 * seed, "token_passes": seconds}
            facts |= other if seed in elsewhere else {}
            cells.append(cell(method, seed, end, **facts))
    summary = summarise(cells)
    assert summary["half"]["run_overhead"] == pytest.approx(160 / 110 - 1)
    assert summary["half"]["compute_overhead"] == pytest.approx(0.5)
    assert "run_overhead" not in summary["all"]
    assert summary["all"]["compute_overhead"] == pytest.approx(-0.91)
    assert table(summary).count("\n") == 1 + len(summary)
    again = cell("plain_again", 1, end, train_seconds=38.0, token_passes=100.0, **other)
    summary = summarise([*cells, again])
    assert summary["all"]["run_overhead"] == pytest.approx(19 / 38 - 1)
    assert summary["half"]["run_overhead"] == pytest.approx(160 / 110 - 1)
    assert summary["plain_again"]["run_overhead"] == 0.0
    assert summary["early_stop"]["run_overhead"] == summary["early_stop"]["compute_overhead"] == 0.0


def test_where_strengths_are_measured_safety_is_matched_along_them() -> None:
    def at(strength: float, harmful: float, refused: float, nll: float) -> dict[str, Any]:
        values = {"harmful": harmful, "over_refusal": refused, "gsm8k_nll": nll}
        return {"strength": strength, "values": values}

    cells = [
        cell("base", 0, (0, 0.0, 0.0, 1.0)),
        cell(
            *("plain", 0, (30, 0.99, 0.7, 1.3), (60, 1.0, 0.8, 1.5)),
            strengths=[at(0.5, 0.9, 0.6, 1.1), at(2.0, 1.0, 1.0, 2.0)],
        ),
        # As safe at 1 + 0.5 * 0.08 / 0.1 of what it learned.
        cell(
            *("default", 0, (30, 0.98, 0.7, 1.1), (60, 0.9, 0.1, 1.1)),
            strengths=[at(1.5, 1.0, 0.2, 1.2), at(0.5, 0.3, 0.0, 1.0)],
        ),
        cell("osf", 0, (30, 0.98, 0.4, 1.1), (60, 0.9, 0.1, 1.1), strengths=[]),
    ]
    summary = summarise(cells)
    (ours,) = summary["default"]["by_seed"]
    assert ours["strength"] == pytest.approx(1.4)
    assert "step" not in ours
    assert ours["metrics"] == pytest.approx({"over_refusal": 0.18, "gsm8k_nll": 1.18})
    assert summary["default"]["measures"]["harmful"] == 0.9
    (scaled,) = summary["scaled_adapter"]["by_seed"]
    assert scaled["strength"] == pytest.approx(0.5 + 0.5 * 0.08 / 0.1)
    (stopped,) = summary["early_stop"]["by_seed"]
    assert stopped["step"] == pytest.approx(30 * 0.98 / 0.99)
    assert summary["plain"]["tax_removed"] == pytest.approx({"over_refusal": 0, "gsm8k_nll": 0})
    # Where there is no adapter to scale, along the run.
    assert summary["osf"]["by_seed"][0]["step"] == 30


def test_without_strengths_of_every_seed_nothing_is_said_of_scaling() -> None:
    half = {"strength": 0.5, "values": {"harmful": 0.9, "over_refusal": 0.6, "gsm8k_nll": 1.1}}
    cells = [
        cell("base", 0, (0, 0.0, 0.0, 1.0)),
        cell("plain", 0, (60, 0.9, 0.8, 1.5), strengths=[half]),
        cell("plain", 1, (60, 1.0, 0.8, 1.5), strengths=[]),
    ]
    assert "scaled_adapter" in summarise(cells[:2])
    assert "scaled_adapter" not in summarise(cells)


def test_a_method_that_never_gets_there_has_no_tax_removed() -> None:
    cells = [
        cell("base", 0, (0, 0.0, 0.0, 1.0)),
        cell("plain", 0, (60, 1.0, 0.8, 1.5)),
        cell("weak", 0, (60, 0.6, 0.1, 1.0)),
    ]
    weak = summarise(cells)["weak"]
    assert weak["matched"] == 0.0
    assert weak["tax_removed"] == {"over_refusal": None, "gsm8k_nll": None}
    assert weak["tax_removed_mean"] is None
    assert weak["tax_removed_end"]["gsm8k_nll"] == pytest.approx(1.0)


def test_where_plain_training_did_not_help_there_is_nothing_to_match() -> None:
    cells = [
        cell("base", 0, (0, 0.10, 0.0, 1.0)),
        cell("plain", 0, (60, 0.11, 0.8, 1.5)),
        cell("default", 0, (60, 0.5, 0.1, 1.0)),
    ]
    summary = summarise(cells)
    assert summary["default"]["matched"] == 0.0
    assert summary["early_stop"]["tax_removed_mean"] is None


def test_the_best_of_a_grid_is_named() -> None:
    cells = [
        cell("base", 0, (0, 0.0, 0.0, 1.0)),
        cell("plain", 0, (60, 1.0, 0.8, 1.5)),
        cell("replay_0.3", 0, (60, 1.0, 0.4, 1.5), grid="replay"),
        cell("replay_1", 0, (60, 1.0, 0.2, 1.5), grid="replay"),
        cell("replay_3", 0, (60, 0.5, 0.0, 1.0), grid="replay"),
    ]
    summary = summarise(cells)
    best = {name: entry.get("best_of_grid") for name, entry in summary.items()}
    assert best["replay_1"] is True
    assert best["replay_0.3"] is False
    assert best["replay_3"] is False  # not as safe
    assert best["plain"] is None


def test_after_two_stages_only_the_last_one_is_compared() -> None:
    base = cell("base", 0, (0, 0.0, 0.0, 1.0))
    own = cell("default", 0, (60, 1.0, 0.5, 1.2))
    own["points"].append({**own["points"][0], "stage": "dpo", "step": 120})
    assert [point.step for point in run_path(own, base)] == [120]
    assert [p.step for p in run_path(cell("default", 0, (60, 1.0, 0.5, 1.2)), base)] == [0, 60]
