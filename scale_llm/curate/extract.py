"""The text of pages, by trafilatura (Barbaresi 2021), in a process of its own with a time limit."""

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox

from scale_llm.config.curate import ExtractConfig
from scale_llm.curate.ledger import Ledger, length_class
from scale_llm.curate.words import TokenCounter

WARM_UP_SECONDS = 60.0
"""For the process to start on a machine under load; it has trafilatura from the one it was forked from."""


class Extract(PipelineStep):
    """Pages become text; documents that are text already pass. What gives no text is removed and counted."""

    type, name = "STEP", "extract"

    def __init__(self, cfg: ExtractConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__()
        self.cfg, self.ledger, self.counter = cfg, ledger, counter

    def run(self, data, rank: int = 0, world_size: int = 1):
        import trafilatura  # noqa: F401  # here and not in the process of its own, whose errors would look like a page's

        # deduplicate would leave out what earlier pages of the same process had: the output would depend on shards
        inner = Trafilatura(favour_precision=self.cfg.favour_precision, deduplicate=False)
        with ExtractorSandbox(timeout=WARM_UP_SECONDS, warmup_text="<p>.</p>") as sandbox:
            for document in data:
                if not document.metadata["html"]:
                    yield document
                    continue
                count = self.ledger.step(self.name)
                count.documents_in += 1
                text, reason = self._text(sandbox, inner, document.text)
                if text is None:
                    self.ledger.remove(self.name, reason, document)
                    continue
                document.text = text
                tokens = document.metadata["tokens"] = self.counter(text)
                document.metadata["html"] = False
                self.ledger.table("length in")[length_class(tokens)] += 1
                count.documents_out += 1
                count.tokens_out += tokens
                yield document

    def _text(self, sandbox: ExtractorSandbox, inner: Trafilatura, html: str) -> tuple[str | None, str]:
        sandbox.timeout = WARM_UP_SECONDS
        sandbox._ensure_process(inner.extract)
        sandbox.timeout = self.cfg.timeout_seconds
        try:
            text = sandbox.process_document(html, inner.extract)
        except TimeoutError:
            return None, "time limit"
        except EOFError:
            return None, "extractor died"
        except Exception as error:
            return None, f"extractor failed: {type(error).__name__}"
        return (text, "") if text and text.strip() else (None, "no text found")
