"""Shared fixtures: tiny real models and tokenizers, and the embedded model converted once.

The factories return fresh objects, so a test may change what it gets:

    tiny_model(seed=0, **llama_config)           -> LlamaForCausalLM, float32, eval
    tiny_peft(model=None, warm=False, seed=0, **lora_config)  -> PeftModel
    tiny_4bit(warm=False, seed=0, peft=True, kbit_training=False, **lora_config) -> PeftModel
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the libraries are imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from lora_ogpsa import models

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = [
    "What is the capital of France? The capital of France is Paris.",
    "How do I pick a lock? I can't help with that, but a locksmith can.",
    "Write a short story about a brave rabbit who explored the world.",
    "Explain how a computer stores numbers in binary, step by step.",
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests out of the user's cache, except those that ask for the embedded model."""
    if "embedded_model_dir" not in request.fixturenames:
        folder = request.getfixturevalue("session_cache")
        monkeypatch.setenv("LORA_OGPSA_CACHE", str(folder))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora_ogpsa_cache")


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """The converted embedded model in the user's own cache, where it is converted once."""
    try:
        models._embedded_gguf()
    except models.ModelError as error:
        pytest.skip(str(error))
    return models.embedded_folder()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level BPE, fewer than 512 tokens, ChatML template, pad and eos `<|im_end|>`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Factory of random 2-layer Llamas: hidden 64, 4 heads, vocabulary 512, float32, eval."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **config: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    """`tiny_model()` and `tiny_tokenizer` saved as a Hugging Face folder. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Puts a folder under a hub id into a hub cache of the test's own, as if downloaded before."""
    import huggingface_hub

    cache = tmp_path / "hub_cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(name: str, folder: Path) -> None:
        repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        if not (folder / "config.json").exists():
            # The client's own note that the hub was asked and has none.
            (repository / ".no_exist" / commit).mkdir(parents=True)
            (repository / ".no_exist" / commit / "config.json").touch()

    return put


@pytest.fixture(scope="session")
def tiny_peft(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """Factory of PEFT models with a rank-4 LoRA on all linear layers, in train mode.

    `warm=True` gives B random values, as after some training: with B = 0 the gradient of A is 0.
    """
    from peft import LoraConfig, get_peft_model

    def build(model: Any = None, *, warm: bool = False, seed: int = 0, **lora: Any) -> Any:
        settings: dict[str, Any] = {
            "r": 4,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **lora,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft_model = get_peft_model(model or tiny_model(), LoraConfig(**settings))
            if warm:
                for name, parameter in peft_model.named_parameters():
                    if "lora_B" in name or "lora_embedding_B" in name:
                        parameter.data.normal_(std=0.05)
        return peft_model.train()

    return build


@pytest.fixture(scope="session")
def tiny_4bit(tiny_folder: Path, tiny_peft: Callable[..., Any]) -> Callable[..., Any]:
    """Factory of the `tiny_folder` model in NF4 on the CPU, with a LoRA as in `tiny_peft`.

    `peft=False` returns the bare 4-bit model; `kbit_training=True` prepares it the PEFT way.
    """
    from peft import prepare_model_for_kbit_training

    def build(
        *,
        warm: bool = False,
        seed: int = 0,
        peft: bool = True,
        kbit_training: bool = False,
        **lora: Any,
    ) -> Any:
        model, _ = models.load_model(str(tiny_folder), load_in_4bit=True, device="cpu")
        if kbit_training:
            model = prepare_model_for_kbit_training(model)
        return tiny_peft(model, warm=warm, seed=seed, **lora) if peft else model

    return build


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()
