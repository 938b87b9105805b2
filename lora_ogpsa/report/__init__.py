"""The written report of a run or of a comparison: one HTML page, and the same in Markdown."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_ogpsa.errors import DataError

HTML_FILE, MARKDOWN_FILE, FIGURES_FOLDER = "report.html", "report.md", "figures"
#: What a report consists of, in the folder of its run.
REPORT_FILES = (HTML_FILE, MARKDOWN_FILE, FIGURES_FOLDER)
# Of these a run has one at least; a recipe alone may lie in any folder of the user's.
_RUN = ("results.json", "evaluations", "runs")


def write_report(folder: Path) -> Path:
    """Write the report of what lies in a folder; an earlier report there is replaced.

    Args:
        folder: output folder of ``lora-ogpsa run`` or ``lora-ogpsa compare``.

    Returns:
        The HTML page. It loads nothing; ``report.md`` and ``figures/`` hold the same.

    Raises:
        OGPSAError: the folder is neither, or what is there cannot be read.
    """
    from lora_ogpsa.report.from_compare import read_compare
    from lora_ogpsa.report.from_run import read_run
    from lora_ogpsa.report.markdown import to_markdown
    from lora_ogpsa.report.page import to_html
    from lora_ogpsa.report.parts import gather
    from lora_ogpsa.stages import write_text

    if (folder / "compare.yaml").is_file():
        report = read_compare(folder, folder / "compare.yaml")
    elif (folder / "recipe.yaml").is_file() and any((folder / name).exists() for name in _RUN):
        report = read_run(folder, folder / "recipe.yaml")
    else:
        raise DataError(
            f"{folder} is not the output folder of `lora-ogpsa run` or `lora-ogpsa compare`: it "
            "holds neither a compare.yaml nor a recipe.yaml with results beside it."
        )
    parts = gather(report)
    figures = folder / FIGURES_FOLDER
    if figures.is_dir():
        shutil.rmtree(figures)
    for picture in parts.pictures():
        figures.mkdir(exist_ok=True)
        (figures / f"{picture.name}.png").write_bytes(picture.png)
    write_text(folder / MARKDOWN_FILE, to_markdown(report, parts))
    write_text(folder / HTML_FILE, to_html(report, parts))
    return folder / HTML_FILE
