"""Adapters that leave as real models: merge, verify, card, GGUF."""

from lora_ogpsa.export.card import push_to_hub, write_model_card
from lora_ogpsa.export.gguf_lora import export_lora_gguf
from lora_ogpsa.export.gguf_model import export_gguf
from lora_ogpsa.export.merge import MergeReport, merge_adapter
from lora_ogpsa.export.ollama import write_modelfile
from lora_ogpsa.export.pipeline import ExportResult, export_merged
from lora_ogpsa.export.quantisation import Quantisation, describe_quantisation
from lora_ogpsa.export.verification import Tolerance, VerificationReport
from lora_ogpsa.export.verify import verify_merge

__all__ = [
    "ExportResult",
    "MergeReport",
    "Quantisation",
    "Tolerance",
    "VerificationReport",
    "describe_quantisation",
    "export_gguf",
    "export_lora_gguf",
    "export_merged",
    "merge_adapter",
    "push_to_hub",
    "verify_merge",
    "write_model_card",
    "write_modelfile",
]
