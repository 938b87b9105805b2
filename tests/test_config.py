from dataclasses import replace

import pytest

from lora_ogpsa import OGPSAConfig
from lora_ogpsa.config import has_likelihood
from lora_ogpsa.errors import ConfigError


def test_defaults_resolve_to_the_streamed_budget():
    config = OGPSAConfig()
    assert (config.constraint, config.granularity, config.metric) == (
        "budget",
        "global",
        "optimizer",
    )
    assert (config.refresh, config.refresh_every, config.references_per_refresh) == (
        "stream",
        1,
        3,
    )
    assert config.sketch_size == 2 * config.rank
    assert config.first_token_weight == 0.33
    assert config.penalty is None
    assert config.penalty_on(labels=True) == 0.25
    assert config.penalty_on(labels=False) == 0.0
    assert not config.keeps_latest


@pytest.mark.parametrize(
    ("preferences", "likelihood", "from_base", "penalty", "penalty_of"),
    [
        (False, True, True, 0.25, "means"),
        (False, True, False, 0.25, "means"),
        (True, True, True, 0.5, "latest"),
        (True, True, False, 0.0, "means"),
        (True, False, True, 0.0, "means"),
    ],
)
def test_what_is_not_given_goes_by_the_training(
    preferences, likelihood, from_base, penalty, penalty_of
):
    loss = {"preferences": preferences, "likelihood": likelihood, "from_base": from_base}

    def acting(**given):
        return OGPSAConfig(**given).acting(**loss)

    found = acting()
    assert (found.penalty, found.penalty_of) == (penalty, penalty_of)
    assert found.first_token_weight == (0.33 if likelihood else 0.0)
    assert found.acting(**loss) == found
    # What is given acts on every loss, and one without the other goes by it all the same.
    assert acting(penalty=0.125).penalty == 0.125
    assert acting(penalty=0.125).penalty_of == penalty_of
    assert acting(penalty_of="latest").penalty == penalty
    assert acting(penalty_of="means").penalty_of == "means"
    # Only the budget has a penalty that nobody asked for.
    for other in ({"constraint": "halfspace"}, {"constraint": "orthogonal"}, {"preset": "paper"}):
        assert acting(**other).penalty == 0.0


@pytest.mark.parametrize(
    ("loss_type", "loss_weights", "found"),
    [
        (["sigmoid", "sft"], None, True),
        (["sigmoid", "sft"], [1.0, 0.2], True),
        (["sigmoid", "sft"], [1.0, 0.0], False),
        ("sft", None, True),
        ("sigmoid", None, False),
        (None, None, False),
    ],
)
def test_likelihood_is_a_part_of_a_loss_by_its_name_and_weight(loss_type, loss_weights, found):
    assert has_likelihood(loss_type, loss_weights) is found


def test_orthogonal_resolves_to_intervals_per_adapter():
    config = OGPSAConfig(constraint="orthogonal")
    assert (config.granularity, config.refresh, config.refresh_every) == (
        "adapter",
        "interval",
        20,
    )
    assert config.references_per_refresh == 16
    assert config.decay == 0.0
    assert config.first_token_weight == 0.0
    assert config.penalty == 0.0


def test_paper_preset_is_the_published_rule():
    config = OGPSAConfig(preset="paper")
    assert (config.space, config.granularity, config.constraint, config.rows) == (
        "gradient",
        "tensor",
        "orthogonal",
        "means",
    )
    assert (config.rank, config.refresh_every, config.references_per_refresh) == (2, 30, 400)
    assert config.metric == "euclidean"
    assert config.restoration == 0.0


def test_paper_preset_lets_the_cost_be_changed_but_not_the_rule():
    assert OGPSAConfig(preset="paper", refresh_every=5).refresh_every == 5
    with pytest.raises(ConfigError, match=r"fixes `constraint='orthogonal'`.*halfspace"):
        OGPSAConfig(preset="paper", constraint="halfspace")


def test_paper_preset_leaves_the_usual_rank_and_precision_to_who_asks_for_them():
    usual = OGPSAConfig()
    given = OGPSAConfig(preset="paper", rank=usual.rank, basis_dtype=usual.basis_dtype)
    assert (given.rank, given.basis_dtype) == (8, "bfloat16")


@pytest.mark.parametrize(
    "config", [OGPSAConfig(), OGPSAConfig(preset="paper"), OGPSAConfig(constraint="halfspace")]
)
def test_round_trip_through_a_dictionary(config):
    assert OGPSAConfig.from_dict(config.to_dict()) == config


def test_a_replaced_field_takes_none_along_that_was_filled_in_for_another_value():
    usual = OGPSAConfig()
    assert replace(usual, budget=0.1) == OGPSAConfig(budget=0.1)
    assert replace(usual, rank=4, sketch_size=12) == OGPSAConfig(rank=4, sketch_size=12)
    # Twice replaced: what was given the first time stays.
    halfspace = OGPSAConfig(constraint="halfspace", granularity="global")
    assert replace(replace(halfspace, seed=1), seed=0) == halfspace
    with pytest.raises(ConfigError, match=r"`granularity='global'` \(now 'adapter'\).*`OGPSAC"):
        replace(usual, constraint="halfspace")
    with pytest.raises(ConfigError, match="`sketch_size=16`"):
        replace(usual, rank=16)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"`refresh_evry`.*Did you mean `refresh_every`"):
        OGPSAConfig.from_dict({"refresh_evry": 3})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"space": "weights"}, "space"),
        ({"constraint": "soft"}, "constraint"),
        ({"preset": "best"}, "preset"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"refresh_every": -1}, "refresh_every"),
        ({"references_per_refresh": 0}, "references_per_refresh"),
        ({"decay": 1.0}, "decay"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"budget": -0.1}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"recovery": 0.0}, "recovery"),
        ({"restoration": 2.0}, "restoration"),
        ({"penalty": -1.0}, "penalty"),
        ({"early_refreshes": (-1,)}, "early_refreshes"),
        ({"basis_dtype": "int4"}, "basis_dtype"),
        ({"constraint": "orthogonal", "offload": "yes"}, "offload"),
        ({"metric_damping": 0}, "metric_damping"),
        # With what is infinite a step has no length, and every row leaves it alone.
        ({"metric_damping": float("inf")}, "metric_damping"),
        ({"max_correction": float("inf")}, "max_correction"),
        ({"restoration_cap": float("inf")}, "restoration_cap"),
        ({"budget": 1e39}, "budget"),
    ],
)
def test_out_of_range_is_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=f"`{named}`"):
        OGPSAConfig(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sketch_size": 4, "rank": 8}, "sketch_size"),
        ({"constraint": "orthogonal", "rows": "means", "energy": 0.5}, "energy"),
        ({"constraint": "budget", "space": "gradient"}, "space='update'"),
        ({"constraint": "budget", "granularity": "adapter"}, "granularity='global'"),
        ({"constraint": "budget", "restoration": 0.5}, "restoration"),
        ({"constraint": "orthogonal", "penalty": 1.0}, "`penalty` adds"),
        ({"constraint": "halfspace", "space": "gradient", "penalty": 1.0}, "update space"),
        (
            {"constraint": "orthogonal", "space": "gradient", "metric": "optimizer"},
            "metric='euclidean'",
        ),
        ({"constraint": "halfspace", "adaptive_threshold": 0.5}, "adaptive_threshold"),
        ({"basis_dtype": "int8"}, "`constraint='budget'` has none"),
        ({"constraint": "halfspace", "offload": True}, "`constraint='halfspace'` has none"),
        ({"constraint": "halfspace", "restoration": 0.5}, "refresh='interval'"),
        (
            {"constraint": "orthogonal", "space": "gradient", "restoration": 0.5},
            "space='update'",
        ),
    ],
)
def test_contradictions_are_refused_with_a_way_out(values, named):
    with pytest.raises(ConfigError, match=named):
        OGPSAConfig(**values)
