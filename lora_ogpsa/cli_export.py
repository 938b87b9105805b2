"""`lora-ogpsa merge` and `lora-ogpsa export`: from an adapter to files that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_ogpsa.cli_errors import fail, one_line_errors

if TYPE_CHECKING:
    from lora_ogpsa.export import Quantisation


@one_line_errors
def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder of the merged model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="ADAPTER:WEIGHT",
            help="Merge another adapter too, its change times WEIGHT; repeatable.",
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option(help="How much of the first adapter's change is applied.")
    ] = 1.0,
    strategy: Annotated[
        str,
        typer.Option(help="`dequantised` weights as trained on, `original` weights, or `auto`."),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="`bfloat16`, `float16`, `float32`, or `auto`.")
    ] = "bfloat16",
    quant_type: Annotated[
        str | None,
        typer.Option(help="`nf4` or `fp4`: how the base was loaded, if the adapter has no record."),
    ] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="With --quant-type: whether the scales were quantised too.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the merged model with the model as trained.")
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to compare on, instead of built-in ones.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest mean KL allowed, nats per token [default: 0.02; 0.5 for a QLoRA adapter "
            "in original weights].",
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Smallest share of equal top-1 tokens allowed [default: 0.9; 0.6 for a QLoRA "
            "adapter in original weights].",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Also measure the other strategy of merging a QLoRA adapter.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file; also most of the memory that is needed.")
    ] = "2GB",
    device: Annotated[
        str,
        typer.Option(
            help="`cpu` or `cuda`: where a QLoRA adapter's base weights pass through 4 bits. Every "
            "other weight is merged on the CPU."
        ),
    ] = "cpu",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it at the end, privately.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")] = False,
) -> None:
    """Merge an adapter into its base as a plain 16-bit model, and check that it answers the same.

    For example:

        lora-ogpsa merge outputs/quickstart/adapter aligned-model

        lora-ogpsa merge my-adapter aligned-model --base meta-llama/Llama-3.1-8B-Instruct

        lora-ogpsa merge safety-adapter both --with style-adapter:0.5 --prompts my_prompts.jsonl
    """
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa import export as exports
    from lora_ogpsa.console import err, out

    if not verify and (prompts is not None or max_kl is not None or min_top1 is not None):
        fail("--prompts, --max-kl and --min-top1 are about the comparison that --no-verify skips.")
    found = exports.export_merged(
        [(adapter, weight), *map(_weighted, others or ())],
        output,
        base=base,
        strategy=strategy,  # type: ignore[arg-type]  # checked there, with its own message
        dtype=dtype,
        quantisation=_quantisation(quant_type, double_quant),
        verify=verify,
        prompts=None if prompts is None else _prompts(prompts),
        max_kl=max_kl,
        min_top1=min_top1,
        compare=compare,
        max_shard_size=max_shard_size,
        device=device,
        overwrite=overwrite,
        progress=err.is_terminal,
    )
    if found.verification is not None:
        out.print(found.verification.to_markdown(), markup=False, soft_wrap=True)
    typer.echo(f"merged model: {output}", err=True)
    if push_to_hub is not None:
        typer.echo(f"uploaded: {exports.push_to_hub(output, push_to_hub)}", err=True)


def _weighted(text: str) -> tuple[str, float]:
    name, colon, share = text.rpartition(":")
    try:
        return (name, float(share)) if colon and name else (text, 1.0)
    except ValueError:
        fail(f"--with takes ADAPTER:WEIGHT such as style-adapter:0.5. Found {text!r}.")


def _quantisation(kind: str | None, double: bool | None) -> Quantisation | None:
    from lora_ogpsa.export import Quantisation

    if kind is None:
        if double is not None:
            fail("--double-quant and --no-double-quant need --quant-type beside them.")
        return None
    if kind not in ("nf4", "fp4"):
        fail(f"--quant-type should be nf4 or fp4. Found {kind!r}.")
    return Quantisation(quant_type=kind, double_quant=double is not False)


def _prompts(path: Path) -> list[Any]:
    from lora_ogpsa.chat import as_messages
    from lora_ogpsa.data import load_rows

    rows = enumerate(load_rows(path), start=1)
    return [as_messages(row, name=f"{path}, row {number}")[0] for number, row in rows]


@one_line_errors
def export(
    model: Annotated[Path, typer.Argument(help="Merged model's folder, or an adapter's.")],
    output: Annotated[Path, typer.Argument(help="GGUF file to write.")],
    type: Annotated[
        str | None, typer.Option(help="Such as `q8_0` (a model) or `f16` (an adapter).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="An adapter's base model, if not the one that it names.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name in the file [default: the folder's name].")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Write an Ollama Modelfile beside a model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier files.")] = False,
) -> None:
    """Write a model or an adapter as GGUF, for llama.cpp and Ollama.

    For example:

        lora-ogpsa export outputs/quickstart/merged aligned.gguf --type q8_0 --modelfile

        lora-ogpsa export outputs/quickstart/adapter aligned-adapter.gguf
    """
    from lora_ogpsa.quiet import quiet_libraries

    quiet_libraries()
    from lora_ogpsa.console import err
    from lora_ogpsa.export import export_gguf, export_lora_gguf, write_modelfile
    from lora_ogpsa.export.folder import check_file
    from lora_ogpsa.export.ollama import MODELFILE

    shared: dict[str, Any] = {"name": name, "overwrite": overwrite}
    if (model / "adapter_config.json").is_file():
        if modelfile:
            fail("--modelfile needs a merged model's folder. Merge first: lora-ogpsa merge.")
        export_lora_gguf(model, output, base=base, type=type or "f16", **shared)
    else:
        if base is not None:
            fail("--base is for adapters; a merged model is its own.")
        if modelfile:  # now rather than after the GGUF file
            check_file(output.parent / MODELFILE, overwrite=overwrite)
        export_gguf(model, output, type=type or "q8_0", progress=err.is_terminal, **shared)
        if modelfile:
            written = write_modelfile(model, output, overwrite=overwrite)
            typer.echo(f"Modelfile: {written}", err=True)
    typer.echo(f"GGUF: {output}", err=True)
