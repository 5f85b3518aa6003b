"""Personal data becomes <EMAIL>, <CARD>, <ID>, <IP>, <PHONE>: what validates as such, not what looks like it.

Cards and personal numbers need the right check digits (python-stdnum), phone numbers a valid plan of numbers
(libphonenumber), addresses a public range. Numbers of other kinds, such as years, prices and ISBNs, stay.
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Iterable

from datatrove.data import Document
from datatrove.pipeline.formatters import PIIFormatter

from scale_llm.config.curate import PiiConfig
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import TokenCounter

NATIONAL_IDS = {
    "us": ("us.ssn", r"\d{3}-\d{2}-\d{4}"),
    "gb": ("gb.nhs", r"\d{3}[ -]\d{3}[ -]\d{4}"),
    "fr": ("fr.nir", r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}"),
    "es": ("es.dni", r"\d{8}-?[A-Z]"),
    "it": ("it.codicefiscale", r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]"),
    "nl": ("nl.bsn", r"\d{4}\.\d{2}\.\d{3}"),
    "br": ("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    "in": ("in_.aadhaar", r"[2-9]\d{3} \d{4} \d{4}"),
    "cn": ("cn.ric", r"\d{17}[\dX]"),
    "se": ("se.personnummer", r"\d{6}(?:\d{2})?[-+]\d{4}"),
    "pl": ("pl.pesel", r"\d{11}"),
    "de": ("de.idnr", r"\d{2} \d{3} \d{3} \d{3}"),
}
"""By country: the module of python-stdnum that checks, and the spellings that are checked."""

_EMAIL = PIIFormatter().emails_replacer.regex
_CARD = re.compile(r"(?<![\d.,-])[3-6](?:[ -]?\d){12,18}(?![\d]|[.,-]\d)")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_PHONE_LIKE = re.compile(r"(?:\+|\(?\d)[\d\s().\-/]{5,}\d")
_LINE_OF_CARDS = (13, 19)


class Mask(Judge):
    """Replaces personal data; removes no document. Reasons are the kinds that were found."""

    secret = True

    def __init__(self, cfg: PiiConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("pii", ledger, counter)
        self.cfg = cfg

    def judge(self, document: Document, position: int) -> Verdict:
        document.text, self.reasons = mask(document.text, self.cfg)
        return True


def mask(text: str, cfg: PiiConfig) -> tuple[str, list[str]]:
    """The text without personal data, and the kinds of it that were there. Longer numbers go first: part of a card
    number may be a phone number, and not the other way round."""
    found: list[str] = []

    def replace(kind: str, pattern: re.Pattern[str], valid: Callable[[str], bool]) -> None:
        nonlocal text
        changed = pattern.sub(lambda match: f"<{kind.upper()}>" if valid(match.group()) else match.group(), text)
        if changed != text:
            text = changed
            found.append(kind)

    if cfg.email and "@" in text:
        replace("email", _EMAIL, lambda _: True)
    if not any(character.isdigit() for character in text) and ":" not in text:
        return text, found
    if cfg.card:
        replace("card", _CARD, is_card)
    for pattern, valid in _national(tuple(cfg.national_ids)):
        replace("id", pattern, valid)
    if cfg.ip:
        replace("ip", _IPV4, _is_public)
        replace("ip", _IPV6, _is_public)
    if cfg.phone and _PHONE_LIKE.search(text):
        text = _without_phones(text, cfg.phone_region, found)
    return text, list(dict.fromkeys(found))


def is_card(number: str) -> bool:
    """13 to 19 digits of an issuer's range, with a right last digit (ISO/IEC 7812)."""
    from stdnum import luhn

    digits = re.sub(r"\D", "", number)
    shortest, longest = _LINE_OF_CARDS
    return shortest <= len(digits) <= longest and len(set(digits)) > 1 and luhn.is_valid(digits)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


@functools.cache
def _national(countries: Iterable[str]) -> list[tuple[re.Pattern[str], Callable[[str], bool]]]:
    import importlib

    checks = []
    for country in countries:
        module, spelling = NATIONAL_IDS[country]
        valid = importlib.import_module(f"stdnum.{module}").is_valid
        checks.append((re.compile(rf"(?<![\w.-]){spelling}(?![\w]|[.-]\w)"), valid))
    return checks


def _without_phones(text: str, region: str, found: list[str]) -> str:
    import phonenumbers

    parts, end = [], 0
    for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
        parts += [text[end : match.start], "<PHONE>"]
        end = match.end
    if parts:
        found.append("phone")
    return "".join(parts) + text[end:]
