"""From a configuration to phases: steps in a row, parted where a step must see all documents before any goes on."""

from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import CurationConfig
from scale_llm.config.data import BadRow
from scale_llm.curate import decontaminate, exact, near, pii, quality, sentences
from scale_llm.curate.executors import Phase
from scale_llm.curate.extract import Extract
from scale_llm.curate.filters import Url, rules
from scale_llm.curate.inputs import Inputs
from scale_llm.curate.ledger import Begin, Ledger
from scale_llm.curate.reading import Read
from scale_llm.curate.report import Report
from scale_llm.curate.sources import kind_of
from scale_llm.curate.step import Judge
from scale_llm.curate.words import TokenCounter
from scale_llm.curate.writing import ReadBetween, Write, WriteBetween, WriteRows


class _Builder:
    """Collects phases. Those over documents have a folder each: documents/, ledger/ and removed/."""

    def __init__(self, cfg: CurationConfig, work: Path, shards: int):
        self.cfg, self.work, self.shards = cfg, work, shards
        self.phases: list[Phase] = []
        self.folders: list[Path] = []
        self.counter = TokenCounter(cfg.curate.tokenizer)

    def open(self, name: str) -> Ledger:
        """Begins a phase over documents; returns the ledger that its steps share."""
        folder = self.work / f"{len(self.phases):02d}-{name}"
        self.folders.append(folder)
        cfg = self.cfg.curate
        removed = folder / "removed" if cfg.keep_removed else None
        self.ledger = Ledger(folder / "ledger", removed=removed, examples=cfg.report.examples, label=cfg.report.label)
        self.begin = Begin(self.ledger)
        self.steps: list[PipelineStep] = [self.begin]
        if len(self.folders) > 1:
            self.steps.append(ReadBetween(self.folders[-2] / "documents"))
        return self.ledger

    def add(self, *steps: PipelineStep) -> None:
        self.steps += steps

    def close(self, *sinks: PipelineStep) -> None:
        """Ends the phase: its documents are written, and signed by the sinks."""
        self._end(WriteBetween(self.folders[-1] / "documents", self.ledger), *sinks)

    def end(self) -> None:
        """Ends the last phase over documents."""
        cfg, folder = self.cfg.curate, self.folders[-1] / "documents"
        self._end(WriteRows(folder, self.ledger, text_key=cfg.text, compress=cfg.compression))

    def _end(self, write: Write, *sinks: PipelineStep) -> None:
        name = self.folders[-1].name
        self.begin.steps = [str(step.name) for step in self.steps if isinstance(step, Read | Extract | Judge)]
        self.phases.append(Phase(name, self.shards, [*self.steps, write, *sinks]))

    def alone(self, name: str, *steps: PipelineStep, tasks: int = 1) -> None:
        """A phase between those over documents."""
        self.phases.append(Phase(f"{len(self.phases):02d}-{name}", tasks, list(steps)))


def phases_of(cfg: CurationConfig, inputs: Inputs, output: Path) -> list[Phase]:
    """The phases of a curation in their order. What they write lies below output/work until the last publishes it."""
    curate, work = cfg.curate, output / "work"
    build = _Builder(cfg, work, len(inputs.shards))
    ledger = build.open("rules")
    build.add(Read(inputs.shards, curate, ledger, build.counter, stop=cfg.on_bad_row is BadRow.fail))
    if curate.url.enabled:
        build.add(Url(curate, ledger, build.counter))
    if any(kind_of(piece.file) == "warc" for shard in inputs.shards for piece in shard):
        build.add(Extract(curate.extract, ledger, build.counter))
    build.add(*rules(curate, ledger, build.counter))
    _copies_and_quality(cfg, inputs, build)
    _near(cfg, build)
    _sentences(cfg, build)
    if inputs.evaluations:
        build.add(decontaminate.Decontaminate(work / "evaluations", build.ledger, build.counter))
    if curate.pii.enabled:
        build.add(pii.Mask(curate.pii, build.ledger, build.counter))
    build.end()
    if inputs.evaluations:
        index = decontaminate.Index(inputs.evaluations, curate.decontaminate, work / "evaluations")
        build.phases.insert(0, Phase("evaluations", 1, [index]))
    build.alone("report", Report(output, build.folders, inputs, curate))
    return build.phases


def _copies_and_quality(cfg: CurationConfig, inputs: Inputs, build: _Builder) -> None:
    curate, work = cfg.curate, build.work
    if not curate.exact.enabled and not curate.quality.enabled:
        return
    signatures, found, model = work / "exact" / "signatures", work / "exact" / "found", work / "quality.npy"
    build.close(*([exact.Sign(signatures)] if curate.exact.enabled else []))
    documents = build.folders[-1] / "documents"
    if curate.exact.enabled:
        build.alone("find-copies", exact.find(signatures, found))
    if curate.quality.enabled:
        train = quality.Train(curate.quality, inputs.references, documents, build.shards, curate.text, model)
        build.alone("train-quality", train)
    ledger = build.open("copies")
    steps: list[Judge] = []
    if curate.exact.enabled:
        steps.append(exact.Drop(found, ledger, build.counter))
    if curate.quality.enabled:
        steps.append(quality.Score(model, ledger, build.counter))
    build.add(*steps)


def _near(cfg: CurationConfig, build: _Builder) -> None:
    if not cfg.curate.near.enabled:
        return
    options, folder = cfg.curate.near, build.work / "near"
    build.close(near.Sign(folder, options))
    build.alone("find-pairs", near.Pairs(folder, options), tasks=min(options.buckets, build.shards))
    build.alone("find-clusters", near.Cluster(folder, options))
    build.add(near.Drop(folder, build.open("near"), build.counter))


def _sentences(cfg: CurationConfig, build: _Builder) -> None:
    if not cfg.curate.sentences.enabled:
        return
    options, folder = cfg.curate.sentences, build.work / "sentences"
    build.close(sentences.Sign(folder / "signatures", options))
    build.alone("find-sentences", sentences.find(folder / "signatures", folder / "found", options))
    build.add(sentences.Cut(folder / "found", options, build.open("sentences"), build.counter))
