"""What the report's templates show, as plain lists and dictionaries."""

from collections import Counter
from typing import Any

from scale_llm.config.curate import CurateConfig
from scale_llm.curate.totals import Totals

BAD_ROWS_SHOWN = 50
CLUSTERS_SHOWN = 10
MEMBERS_SHOWN = 4


def view(totals: Totals, cfg: CurateConfig, files: int) -> dict[str, Any]:
    """Everything between the headings."""
    steps = [_step(name, count) for name, count in totals.steps.items()]
    documents = totals.tables.get("documents of file", Counter())
    return {
        "documents_in": totals.documents_in,
        "documents_out": totals.documents_out,
        "tokens_in": next((s["tokens_in"] for s in steps[1:] if s["tokens_in"]), steps[0]["tokens_in"]),
        "tokens_out": steps[-1]["tokens_out"],
        "token": f"as {cfg.tokenizer} cuts text" if cfg.tokenizer else "a word, or a Chinese or Japanese character",
        "files": files,
        "empty_files": sorted(file for file, count in documents.items() if not count),
        "steps": steps,
        "reasons": [part for name, count in totals.steps.items() for part in _reasons(name, count) if name != "read"],
        "unread": totals.steps["read"].removed.most_common(),
        "bad_rows": totals.bad[:BAD_ROWS_SHOWN],
        "bad_rows_more": max(0, len(totals.bad) - BAD_ROWS_SHOWN),
        "other_records": totals.tables.get("other records", Counter()).most_common(),
        "notes": [*totals.tables.get("notes", Counter()).items(), *totals.found.get("evaluations", {}).items()],
        "kinds": kinds(totals),
        "clean": clean_kept(totals),
        "languages": totals.tables.get("language in", Counter()).most_common(15),
        "languages_out": totals.tables.get("language out", Counter()),
        "lengths": lengths(totals),
        "clusters": _clusters(totals),
        "cluster_sizes": sorted(
            (int(size), n) for size, n in totals.found.get("clusters", {}).get("sizes", {}).items()
        ),
        "quality": totals.found.get("quality"),
    }


def _step(name: str, count: Any) -> dict[str, Any]:
    removed = sum(count.removed.values())
    seen = count.documents_in or 1
    return {
        "name": name, "documents_in": count.documents_in, "documents_out": count.documents_out, "removed": removed,
        "share": removed / (seen + removed if name == "read" else seen), "changed": count.changed,
        "tokens_in": count.tokens_in, "tokens_out": count.tokens_out, "seconds": count.seconds,
    }  # fmt: skip


def _reasons(name: str, count: Any) -> list[dict[str, Any]]:
    tables = (("removed", count.removed), ("changed", count.changes))
    return [
        {"step": name, "what": what, "reason": reason, "count": n, "examples": count.examples.get(reason, [])}
        for what, table in tables
        for reason, n in table.most_common()
    ]


def kinds(totals: Totals) -> list[dict[str, Any]]:
    """Of each label but clean: documents that have it, those that its step found and that any step found, and the share
    of documents that the step acted on which have the label."""
    found = []
    for label, planted in sorted(totals.tables.get("labels", Counter()).items()):
        step, _, reason = label.partition(".")
        count = totals.steps.get(step)
        if label == "clean" or count is None:
            continue
        key = f" {reason}" if reason else ""
        hit, acted = count.acted[label + key], count.acted[key]
        others = sum(other.lost[label] for name, other in totals.steps.items() if name != step)
        found.append(
            {
                "label": label,
                "planted": planted,
                "found": hit,
                "recall": hit / planted,
                "found_by_any": min(planted, hit + others),
                "precision": hit / acted if acted else None,
            }  # fmt: skip
        )
    return found


def clean_kept(totals: Totals) -> dict[str, Any] | None:
    """Of documents labelled clean, those that stayed."""
    clean = totals.tables.get("labels", Counter())["clean"]
    if not clean:
        return None
    kept = clean - sum(count.lost["clean"] for count in totals.steps.values())
    return {"documents": clean, "kept": kept, "share": kept / clean}


def lengths(totals: Totals) -> list[tuple[int, int, int]]:
    """(tokens from, documents in, documents out) by powers of two."""
    before, after = (totals.tables.get(f"length {way}", Counter()) for way in ("in", "out"))
    return [(size, before[str(size)], after[str(size)]) for size in sorted({int(key) for key in before + after})]


def _clusters(totals: Totals) -> list[dict[str, Any]]:
    largest = totals.found.get("clusters", {}).get("largest", {})
    shown = sorted(largest.items(), key=lambda item: (-item[1], int(item[0])))[:CLUSTERS_SHOWN]
    members = {number: list(totals.tables.get(f"cluster {number}", Counter())) for number, _ in shown}
    return [{"size": size, "members": members[number][:MEMBERS_SHOWN]} for number, size in shown]
