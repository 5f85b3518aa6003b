"""What a curation reads, found and checked before it starts: every problem at once."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_llm.config.curate import CurateConfig, CurationConfig
from scale_llm.config.errors import UserError
from scale_llm.curate.pii import NATIONAL_IDS
from scale_llm.curate.sources import Shard, expand, kind_of, shards_of
from scale_llm.data.corpus import read_file
from scale_llm.data.files import stamp
from scale_llm.data.rows import Problems
from scale_llm.data.sources import RAW_EXTENSIONS


@dataclass(slots=True)
class Inputs:
    files: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    def stamps(self) -> dict[str, list[Any]]:
        """What changes when a file does."""
        return {name: [stamp(file) for file in getattr(self, name)] for name in ("files", "evaluations", "references")}


def find(cfg: CurationConfig) -> Inputs:
    """Files of the curation, without shards. Raises UserError with all that is missing or unknown."""
    curate, inputs = cfg.curate, Inputs()
    inputs.files, problems = expand(cfg.input, "input")
    if curate.decontaminate.enabled and curate.decontaminate.against is not None:
        key = "curate.decontaminate.against"
        inputs.evaluations, found = expand(curate.decontaminate.against, key)
        problems += found + _kinds(inputs.evaluations, key)
    if curate.quality.enabled and curate.quality.reference is not None:
        key = "curate.quality.reference"
        inputs.references, found = expand(curate.quality.reference, key)
        problems += found + _kinds(inputs.references, key)
        problems += [] if found else _empty(inputs.references, curate.text)
    problems += _files(curate) + _names(curate) + _extractor(inputs.files)
    output = Path(cfg.output).resolve()
    problems += [
        f"input={file}: lies in output={cfg.output}; give another output"
        for file in inputs.files
        if output in Path(file).resolve().parents
    ][:1]
    if problems:
        raise UserError(problems)
    return inputs


def cut(inputs: Inputs, cfg: CurationConfig) -> None:
    """Fills the shards."""
    inputs.shards = shards_of(inputs.files, cfg.curate.shard_megabytes)


def _kinds(files: list[str], key: str) -> list[str]:
    """References and evaluation sets are read as training reads its files."""
    wrong = [file for file in files if not file.lower().endswith(RAW_EXTENSIONS)]
    return [f"{key}={file}: cannot be read here; give {', '.join(RAW_EXTENSIONS)}" for file in wrong if kind_of(file)]


def _empty(files: list[str], text_key: str) -> list[str]:
    for file in files:
        problems = Problems()
        if next(read_file(file, text_key, problems), None) is None:
            return problems.found[:1] or [f"curate.quality.reference={file}: holds no text; leave it out"]
    return []


def _extractor(files: list[str]) -> list[str]:
    """Tasks would find out page by page."""
    if not any(kind_of(file) == "warc" for file in files):
        return []
    try:
        import trafilatura  # noqa: F401
    except ImportError as error:
        return [f"input: has WARC files, and trafilatura cannot be imported ({error}); pip install '.[curate]'"]
    return []


def _files(cfg: CurateConfig) -> list[str]:
    named = {"curate.tokenizer": cfg.tokenizer, "curate.toxicity.words": cfg.toxicity.words}
    found = []
    for key, path in named.items():
        if path is not None and not os.path.isfile(os.path.expanduser(path)):
            found.append(f"{key}={path}: no such file; correct the path or leave the key out")
    return found


def _names(cfg: CurateConfig) -> list[str]:
    found = []
    if cfg.language.enabled:
        from scale_llm.curate.filters import identifier

        known = set(identifier().nb_classes)
        for language in cfg.language.languages:
            if language not in known:
                found.append(f"curate.language.languages: {language!r} is none of py3langid's codes, such as en or pt")
    if cfg.pii.enabled:
        import phonenumbers

        for country in cfg.pii.national_ids:
            if country not in NATIONAL_IDS:
                found.append(f"curate.pii.national_ids: {country!r} is unknown; of {', '.join(NATIONAL_IDS)}")
        if cfg.pii.phone_region not in phonenumbers.SUPPORTED_REGIONS:
            found.append(f"curate.pii.phone_region={cfg.pii.phone_region}: no ISO 3166 code; such as US or DE")
    return found
