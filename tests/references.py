"""Token-level reference rows and objectives for tiny models, without text or tokenizer."""

import json

import torch

from lora_ogpsa import Reference


def token_rows(n, seed=0, shortest=4, longest=24, vocabulary=128):
    """`n` rows of random token ids of very different lengths, the second half being the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def token_reference(name="a", n=8, seed=0, **kwargs):
    return Reference(name, token_rows(n, seed), loss=kwargs.pop("loss", "sft"), **kwargs)


def data_folder(folder, **configurations):
    """A data set on disk with a configuration, of a `test` split alone, for each list of rows."""
    lines = ["---", "configs:"]
    for name, rows in configurations.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += ["  - split: test", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def training_step(model, seed):
    """One forward and backward on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (4, 16), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
