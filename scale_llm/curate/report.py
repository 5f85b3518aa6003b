"""The last phase: one report of all ledgers, and the documents in their place."""

import os
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import CurateConfig
from scale_llm.curate.inputs import Inputs
from scale_llm.curate.totals import Totals
from scale_llm.data.files import write_json

REPORT = "report.md"


class Report(PipelineStep):
    type, name = "REPORT", "report"

    def __init__(self, output: Path, folders: list[Path], inputs: Inputs, cfg: CurateConfig):
        super().__init__()
        self.output, self.folders, self.inputs, self.cfg = output, folders, inputs, cfg

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        totals = Totals.gather(self.folders, len(self.inputs.shards), self.cfg.report)
        write_json(self.output / "report.json", totals.to_json())
        self.publish()
        (self.output / REPORT).write_text("ok")

    def publish(self) -> None:
        last = self.folders[-1] / "documents"
        if last.is_dir():
            os.replace(last, self.output / "documents")
