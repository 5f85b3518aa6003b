"""Web documents with faults planted among them, each row labelled with what is wrong with it.

A label is the name of the step that should act, or step.reason. Words are changed and places drawn by a fixed seed.
"""

import json
import random
from pathlib import Path

NATURAL = {
    13: "repetition", 56: "repetition", 140: "repetition", 165: "repetition", 199: "repetition",
    1: "pii.phone", 65: "pii.email", 97: "pii.email", 141: "pii.phone", 167: "pii.email", 168: "pii.email",
    191: "pii.email", 261: "pii.email", 299: ["pii.email", "pii.phone"],
}  # fmt: skip
"""Lines of c4_web.jsonl, read by eye, that have a fault of their own: link farms and a litany; addresses."""

SHORT = 50
"""Words below which Gopher's rule removes a document."""

FOREIGN = (
    "Der Zug nach Hamburg hatte gestern mehr als eine Stunde Verspätung, weil bei Uelzen ein Baum auf die Gleise "
    "gefallen war. Die Reisenden mussten in Hannover umsteigen und kamen erst nach Mitternacht an.",
    "La boulangerie de notre village ouvre chaque matin à six heures, et les habitants font la queue bien avant pour "
    "acheter du pain frais. Le dimanche, les enfants reçoivent un petit gâteau.",
    "El ayuntamiento anunció ayer que las obras del puente terminarán antes del verano, aunque los vecinos todavía "
    "dudan de las fechas. Mientras tanto, los coches deben dar un rodeo por el barrio viejo.",
    "La squadra ha vinto la partita all'ultimo minuto, quando nessuno ci credeva più, e i tifosi hanno festeggiato "
    "tutta la notte nelle strade del centro. L'allenatore ha detto che i ragazzi meritano questa gioia.",
    "De gemeente wil volgend jaar meer bomen planten langs de singels, omdat de zomers steeds warmer worden. Bewoners "
    "mogen zelf aangeven welke soorten zij mooi vinden, maar niet iedereen is blij met de bladeren.",
    "Вчера в нашем городе открылась новая библиотека, и первые читатели пришли уже рано утром. Директор рассказала, "
    "что в залах есть место для трёхсот человек, а книги можно брать домой на целый месяц.",
)

CARDS = ("4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "6011000000000004", "4012888888881881")

BOILERPLATE = (
    ("c4.policy", "This site uses cookies to give you the best experience and to measure how it is used."),
    ("c4.policy", "By continuing to browse you accept our privacy policy and the terms of use in full."),
    ("c4.javascript", "Please enable JavaScript in your browser to see all of the content on this page."),
)

FOOTER = (
    "Sign up for our weekly letter and never miss a story from the garden. Every Friday we choose the five pieces that "
    "our readers liked best. You can leave the list with a single click at any time. We hope to see you there."
)

CURSES = ("blarghum", "snurfle", "fnordic")
"""Invented words for a toxicity list."""


def rows(source: Path, questions: Path, seed: int = 7) -> list[dict]:
    """{text, url, fault} rows: the documents of `source` (c4_web.jsonl), faults put into some, copies behind them."""
    draw = random.Random(seed)
    found = []
    for line, text in enumerate((json.loads(row)["text"] for row in source.open()), start=1):
        fault = NATURAL.get(line, "gopher" if words_in(text) < SHORT else "clean")
        found.append({"text": text, "url": f"https://pages.example/{line}", "fault": fault})
    clean = [row for row in found if row["fault"] == "clean" and 120 <= len(row["text"].split()) <= 1500]
    draw.shuffle(clean)
    asked = [json.loads(row)["question"] for row in questions.open()]
    taken = iter(clean)

    def spoil(fault: str, change) -> None:
        row = next(taken)
        row.update(text=change(row["text"]), fault=fault)

    def copy(fault: str, change) -> None:
        original = next(taken)
        found.append({"text": change(original["text"]), "url": "https://copies.example/page", "fault": fault})

    def insert(fault: str, line: str) -> None:
        spoil(fault, lambda text: inserted(text, line, draw))

    for number in range(12):
        copy("exact", lambda text: text.replace(" ", "  ") + "\n")
        copy("near", lambda text: changed(text, draw))
        insert("decontaminate", draw.choice(asked))
        insert("pii.email", f"Write to jo.doe{number}@mail.example.com before the end of May.")
        insert("pii.card", f"Pay with {CARDS[number % len(CARDS)]} at the desk by noon.")
        insert(*BOILERPLATE[number % len(BOILERPLATE)])
        spoil("repetition", lambda text: repeated(text, draw))
    for number in range(6):
        found.append({"text": FOREIGN[number], "url": f"https://pages.example/x{number}", "fault": "language"})
        spoil("quality", lambda text: scrambled(text, draw))
        spoil("toxicity", lambda text: cursed(text))
        insert("pii.ip", f"The server is 8.8.{number}.4 as before.")
        insert("pii.id", f"Her number is 219-09-99{number + 40} there.")
        next(taken).update(url=f"https://casino.example/{number}", fault="url")
    # In the last rows, one shard: datatrove keeps the span of the document that comes first in its own shard
    free = list(taken)
    long = [row for row in found[250:300] if row in free and words_in(row["text"]) > 150]
    for place, row in enumerate(long[-8:]):
        row.update(text=f"{row['text']}\n{FOOTER}", fault="sentences" if place else "clean")
    return found


def with_questions(questions: list[str], rows: list[dict], others: int = 500) -> list[str]:
    """Lines of the evaluation set: those whose question was planted, and some more."""
    text = "\n".join(row["text"] for row in rows if row["fault"] == "decontaminate")
    asked = [line for line in questions if json.loads(line)["question"] in text]
    return [*asked, *questions[:others]]


def words_in(text: str) -> int:
    return sum(any(character.isalnum() for character in word) for word in text.split())


def changed(text: str, draw: random.Random, share: float = 0.05) -> str:
    """One word in twenty is another word of the text."""
    words = text.split(" ")
    for place in draw.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = draw.choice(words)
    return " ".join(words)


def inserted(text: str, line: str, draw: random.Random) -> str:
    """The line among the text's lines."""
    lines = text.split("\n")
    lines.insert(draw.randrange(len(lines) + 1), line)
    return "\n".join(lines)


def repeated(text: str, draw: random.Random) -> str:
    """One line of the text again and again."""
    lines = text.split("\n")
    return "\n".join([*lines, *[max(lines, key=len)] * draw.randrange(8, 12)])


def scrambled(text: str, draw: random.Random) -> str:
    """The letters of every word but stop words in any order, as of a broken font or a cipher."""
    keep = {"the", "be", "to", "of", "and", "that", "have", "with", "a", "in", "is"}
    words = []
    for word in text.split(" "):
        letters = list(word)
        if word not in keep and word.isalpha():
            draw.shuffle(letters)
        words.append("".join(letters))
    return " ".join(words)


def cursed(text: str) -> str:
    """Every twentieth word is on the list."""
    words = text.split(" ")
    for number, place in enumerate(range(3, len(words), 20)):
        words[place] = CURSES[number % len(CURSES)]
    return " ".join(words)
