"""Pages of WARC files (ISO 28500) and texts of WET files."""

from collections.abc import Iterator
from typing import IO, Any

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from scale_llm.data.opening import DAMAGED, open_bytes

HTML = "_html"
"""Marks a page whose text is still to be extracted."""
PAGES = ("text/html", "application/xhtml+xml")


def pages(file: str, text_key: str, url_key: str, reader: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the record from 1, fields) of each response that is a page, and of each conversion.

    Records that are none (requests, images, redirects) are counted in the table "other records".
    """
    whole = 0  # the last record that was read to its end
    try:
        with open_bytes(file) as stream:  # warcio's own gunzip takes a truncated file for a whole one
            for number, record in enumerate(ArchiveIterator(_Loud(stream)), start=1):
                whole = number - 1
                other = _other(record)
                if other:
                    reader.ledger.table("other records")[other] += 1
                    continue
                fields = _fields(file, number, record, text_key, reader)
                if fields is not None:
                    url = record.rec_headers.get_header("WARC-Target-URI")
                    date = record.rec_headers.get_header("WARC-Date")
                    yield number, {**fields, url_key: url, "date": date}
                whole = number
    except (*DAMAGED, ArchiveLoadFailed) as error:
        reader.damaged(file, whole + 1, error)


class _Loud:
    """A stream whose early end is an error to warcio, too: an EOFError it takes for the end of the archive."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            # Not read, which gives nothing of a block that ends in an error
            return self._stream.read1(size)  # type: ignore[attr-defined]
        except EOFError as error:
            raise OSError(str(error)) from error

    def tell(self) -> int:
        return self._stream.tell()


def _other(record: Any) -> str | None:
    """What a record is that is no page."""
    if record.rec_type not in ("response", "conversion"):
        return str(record.rec_type)
    if record.rec_type == "conversion":
        return None
    if record.http_headers is None:
        return "response without HTTP"
    if record.http_headers.get_statuscode() != "200":
        return f"status {record.http_headers.get_statuscode()}"
    kind = _content_type(record)[0]
    return None if kind in PAGES else f"type {kind or 'not given'}"


def _content_type(record: Any) -> tuple[str, str | None]:
    """(media type, charset) as the server, or the crawler, says."""
    value = record.http_headers.get_header("Content-Type") or ""
    kind, *parameters = [part.strip() for part in value.split(";")]
    identified = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    charset = next((p.split("=", 1)[1].strip("\"' ") for p in parameters if p.lower().startswith("charset=")), None)
    return (identified or kind).lower(), charset


def _fields(file: str, number: int, record: Any, text_key: str, reader: Any) -> dict[str, Any] | None:
    if (record.length or 0) > reader.limit_bytes:
        reader.too_large(file, number, record.length)
        return None
    content = record.content_stream().read(reader.limit_bytes + 1)
    if len(content) > reader.limit_bytes:  # compressed within the record
        reader.too_large(file, number, len(content))
        return None
    missing = record.rec_headers.get_header("Content-Length") and record.raw_stream.limit
    if missing:  # the record promises more bytes than the file has
        raise EOFError(f"{missing} bytes of record {number} are missing")
    if record.rec_type == "conversion":
        return {text_key: content.decode(errors="replace")}
    text = _decode(content, _content_type(record)[1])
    if text is None:
        reader.bad(file, number, "unknown encoding", "the page's bytes are text in no encoding that could be told")
        return None
    return {text_key: text, HTML: True}


def _decode(content: bytes, charset: str | None) -> str | None:
    for name in (charset, "utf-8"):
        try:
            return content.decode(name) if name else None or content.decode("utf-8")
        except (UnicodeDecodeError, LookupError):
            continue
    from charset_normalizer import from_bytes

    best = from_bytes(content).best()
    return str(best) if best is not None else None
