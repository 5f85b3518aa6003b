"""The last phase: the documents in their place, and one report of all ledgers as Markdown, HTML, PNG and JSON."""

import base64
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import CurateConfig
from scale_llm.config.io import write_text
from scale_llm.curate.inputs import Inputs
from scale_llm.curate.report_plot import draw
from scale_llm.curate.report_view import view
from scale_llm.curate.totals import Totals
from scale_llm.data.files import write_json

REPORT = "report.md"
"""Written last: where it is, all is done."""


class Report(PipelineStep):
    """folders: of the phases over documents, in their order."""

    type, name = "REPORT", "report"

    def __init__(self, output: Path, folders: list[Path], inputs: Inputs, cfg: CurateConfig):
        super().__init__()
        self.output, self.folders, self.inputs, self.cfg = output, folders, inputs, cfg

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        totals = Totals.gather(self.folders, len(self.inputs.shards), self.cfg.report)
        totals.add_found(self.output / "work")
        write_json(self.output / "report.json", totals.to_json())
        draw(totals, self.output / "report.png")
        shown = view(totals, self.cfg, len(self.inputs.files))
        picture = base64.b64encode((self.output / "report.png").read_bytes()).decode()
        write_text(self.output / "report.html", _render("report.html.jinja", {**shown, "picture": picture}))
        self._publish()
        write_text(self.output / REPORT, _render("report.md.jinja", shown))
        for folder in self.output.joinpath("work").iterdir():
            if folder.name != "logs":
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()

    def _publish(self) -> None:
        """Moves documents and what was removed out of work/; a second time finds nothing left to move."""
        for number, folder in enumerate(self.folders):
            removed = self.output / "removed" / f"{number}-{folder.name.split('-', 1)[1]}"
            if (folder / "removed").is_dir():
                removed.parent.mkdir(exist_ok=True)
                os.replace(folder / "removed", removed)
        if (self.folders[-1] / "documents").is_dir():
            os.replace(self.folders[-1] / "documents", self.output / "documents")


def _render(name: str, values: dict[str, Any]) -> str:
    import jinja2

    text = resources.files("scale_llm.curate").joinpath("templates", name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=".html." in name, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return environment.from_string(text).render(values)
