"""Measures of safety, over-refusal, utility and divergence, with 95 % intervals."""

from lora_ogpsa.evaluation.judges import Judge, RefusalPhraseJudge, make_judge
from lora_ogpsa.evaluation.model_judges import EndpointJudge, LocalJudge
from lora_ogpsa.evaluation.result import EvaluationResult, Item, Measure, Sample, differences
from lora_ogpsa.evaluation.run import evaluate
from lora_ogpsa.evaluation.statistics import Interval
from lora_ogpsa.evaluation.suite import EvaluationSuite, MeasureSpec
from lora_ogpsa.fingerprints import fingerprint

__all__ = [
    "EndpointJudge",
    "EvaluationResult",
    "EvaluationSuite",
    "Interval",
    "Item",
    "Judge",
    "LocalJudge",
    "Measure",
    "MeasureSpec",
    "RefusalPhraseJudge",
    "Sample",
    "differences",
    "evaluate",
    "fingerprint",
    "make_judge",
]
