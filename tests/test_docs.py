"""The code in the documents, run as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from references import token_rows
from test_callback import PAIRS
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from lora_ogpsa import OGPSA, Reference

ROOT = Path(__file__).parent.parent
PREFERENCES = [
    {"prompt": f"help me with thing {i}", "chosen": "of course", "rejected": "no, i will not"}
    for i in range(8)
]


def blocks(document):
    """(line, code) of every block tagged ``python``."""
    text = (ROOT / document).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match.group(1)) for match in found]


def code(document):
    return [
        pytest.param(document, line, source, id=f"{document}:{line}")
        for line, source in blocks(document)
    ]


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    """TRL's arguments ask for bf16, which they accept on a CPU only beside `use_cpu`."""
    prepare = TrainingArguments.__post_init__

    def on_cpu(self):
        self.use_cpu, self.report_to, self.disable_tqdm = True, [], True
        prepare(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_cpu)


@pytest.fixture
def names(tiny_folder, tiny_tokenizer, tmp_path, monkeypatch):
    """What docs/training-loops.md and README.md leave to the reader."""
    monkeypatch.chdir(tmp_path)  # TRL writes to `trainer_output` by default
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    texts = Dataset.from_list(
        [
            {"prompt": p["prompt"][0]["content"], "completion": p["completion"][0]["content"]}
            for p in PAIRS
        ]
    )
    rows = token_rows(8, shortest=12, longest=12)
    for row in rows:
        row["attention_mask"] = [1] * 12
    batches = [
        {key: torch.tensor([row[key] for row in rows[at : at + 2]]) for key in rows[0]}
        for at in range(0, 8, 2)
    ]
    return {
        "__name__": "docs",
        "base_model": model,
        "model": model,
        "tokenizer": tiny_tokenizer,
        "loader": batches,
        "train_dataset": texts,
        "safety_data": texts,
        "preference_dataset": Dataset.from_list(PREFERENCES),
        "references": [
            Reference(
                "own",
                [{"prompt": f"tell me about topic {i}"} for i in range(4)],
                max_new_tokens=4,
            ),
            Reference("told", PAIRS, loss="sft"),
        ],
        "output_dir": str(tmp_path / "out"),
        "args": SFTConfig(str(tmp_path / "out"), max_steps=2, logging_steps=1),
    }


@pytest.fixture
def projectors(monkeypatch):
    """Every OGPSA that a block makes, and the lengths of the corrections it applied."""
    made = []
    construct, correct = OGPSA.__init__, OGPSA._correction

    def recorded(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.corrections = []
        made.append(self)

    def measured(self, *args):
        fix = correct(self, *args)
        self.corrections.append(float(fix.norm()))
        return fix

    monkeypatch.setattr(OGPSA, "__init__", recorded)
    monkeypatch.setattr(OGPSA, "_correction", measured)
    return made


@pytest.mark.parametrize(("document", "line", "source"), code("docs/training-loops.md"))
def test_training_loops(document, line, source, names, projectors):
    if "train_dataset=train_dataset" in source and "import Trainer," in source:
        rows = [{k: v[0].tolist() for k, v in batch.items()} for batch in names["loader"]]
        names["train_dataset"] = Dataset.from_list(rows)
    if "Accelerator" in source:
        names["loader"] = torch.utils.data.DataLoader(
            [{k: v[0] for k, v in batch.items()} for batch in names["loader"]], batch_size=1
        )
    exec(compile("\n" * line + source, document, "exec"), names)
    (ogpsa,) = projectors
    assert ogpsa.steps >= 2
    assert ogpsa._moved
    assert len(ogpsa.corrections) == ogpsa.steps


def test_readme(names, projectors, tiny_tokenizer, tmp_path):
    """The first block trains; the second only constructs."""
    first, *others = blocks("README.md")
    exec(compile("\n" * first[0] + first[1], "README.md", "exec"), names)
    (ogpsa,) = projectors
    assert ogpsa.steps == 2
    for line, source in others:
        exec(compile("\n" * line + source, "README.md", "exec"), names)


def test_every_test_that_the_support_table_names_exists():
    text = (ROOT / "docs/support.md").read_text()
    named = set(re.findall(r"(test_\w+\.py)::(test_\w+)", text))
    assert len(named) > 20
    for file, test in sorted(named):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
