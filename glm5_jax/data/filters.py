"""Which documents are worth training on, and an account of those that are not.

A rule is a pure function from a text to the reason to drop it, or None. Rules count characters and lines, not words of
some language. Duplicates are found after the rules, over all documents.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import re
import unicodedata

import numpy as np

from glm5_jax.data import similarity
from glm5_jax.data.sources import Document, Selection
from glm5_jax.text.tokenizer import Tokenizer

Rule = Callable[[str], str | None]

_UNBROKEN = re.compile(r"[!-~]{200,}")  # base64, minified code, hashes: ASCII alone, as many scripts need no space
# Control, surrogate, private and unassigned characters; format characters belong to some scripts.
_NOT_TEXT = frozenset({"Cc", "Cs", "Co", "Cn"})


def length(minimum: int = 100, maximum: int = 10_000_000) -> Rule:
    """Drops a text of fewer than `minimum` or more than `maximum` characters: "too short", "too long"."""
    def rule(text: str) -> str | None:
        return "too short" if len(text) < minimum else "too long" if len(text) > maximum else None
    return rule


def repetition(max_lines: float = 0.3, max_phrases: float = 0.5) -> Rule:
    """Drops a text with a larger share of characters in lines seen before, or of shingles seen before in it.

    "repeated lines", "repeated phrases". Lines of less than two letters or digits do not count.
    """
    def rule(text: str) -> str | None:
        seen: set[str] = set()
        repeated = 0
        for line in text.splitlines():
            if line in seen:
                repeated += len(line)
            elif sum(map(str.isalnum, line)) > 1:
                seen.add(line)
        if repeated > max_lines * len(text):
            return "repeated lines"
        hashes = similarity.shingles(text)
        return "repeated phrases" if len(hashes) - len(np.unique(hashes)) > max_phrases * len(hashes) else None
    return rule


def non_text(maximum: float = 0.01) -> Rule:
    """Drops a text with a larger share of characters that no script has, or that stand for lost ones: "not text"."""
    def rule(text: str) -> str | None:
        found = sum(count for character, count in collections.Counter(text).items() if character == "\ufffd"
                    or (unicodedata.category(character) in _NOT_TEXT and not character.isspace()))
        return "not text" if found > maximum * len(text) else None
    return rule


def quality(min_letters: float = 0.4, max_unbroken: float = 0.2) -> Rule:
    """Drops what is neither prose nor code: "few letters", "unbroken runs".

    That is, of the characters that are not white space, a share of letters, digits and marks of any script below
    `min_letters`; or a share above `max_unbroken` in runs of 200 or more ASCII characters without a space.
    """
    def rule(text: str) -> str | None:
        visible = {character: count for character, count in collections.Counter(text).items()
                   if not character.isspace()}
        total = sum(visible.values())
        letters = sum(count for character, count in visible.items() if unicodedata.category(character)[0] in "LNM")
        if letters < min_letters * total:
            return "few letters"
        return "unbroken runs" if sum(map(len, _UNBROKEN.findall(text))) > max_unbroken * total else None
    return rule


RULES: tuple[Rule, ...] = (length(), non_text(), quality(), repetition())


@dataclasses.dataclass(frozen=True)
class Count:
    """How much: documents, UTF-8 bytes, and tokens, which are None where no tokenizer was given."""

    documents: int
    bytes: int
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was kept, and what was dropped for which reason, the reasons by name."""

    kept: Count
    dropped: Mapping[str, Count]

    def table(self) -> str:
        """One line per reason in Markdown, "kept" first."""
        lines = ["| | documents | bytes | tokens |", "|---|---:|---:|---:|"]
        for name, count in {"kept": self.kept, **self.dropped}.items():
            tokens = "" if count.tokens is None else f"{count.tokens:,}"
            lines.append(f"| {name} | {count.documents:,} | {count.bytes:,} | {tokens} |")
        return "\n".join(lines)


def apply(documents: Sequence[Document], rules: Sequence[Rule] = RULES, *, exact: bool = True,
          near: float | None = 0.8, tokenizer: Tokenizer | None = None) -> tuple[Selection, Report]:
    """The documents to keep, in their order, and the report; a document is dropped for the first reason found.

    The rules come first, in order; then `exact` drops a text that was kept before ("duplicate"), and `near` one that
    shares that much with one ("near duplicate", `similarity.near_duplicates`; None leaves it out). `tokenizer` counts
    tokens for the report. Every document is read once for the rules, once for near duplicates, and only marks stay in
    memory. Raises ValueError for a `near` outside (0, 1].
    """
    seen: set[bytes] = set()
    reasons: list[str | None] = []
    sizes = []
    for document in documents:
        content = document.text.encode("utf-8", "surrogatepass")
        reason = next((found for rule in rules if (found := rule(document.text))), None)
        if exact and reason is None:
            mark = hashlib.sha256(content).digest()
            reason = "duplicate" if mark in seen else None
            seen.add(mark)
        reasons.append(reason)
        sizes.append((1, len(content), len(tokenizer.encode(document.text)) if tokenizer else 0))
    if near is not None:
        left = [number for number, reason in enumerate(reasons) if reason is None]
        alike = similarity.near_duplicates((documents[number].text for number in left), near)
        for number, other in zip(left, alike):
            reasons[number] = None if other is None else "near duplicate"

    def count(reason: str | None) -> Count:
        same = np.array([size for found, size in zip(reasons, sizes) if found == reason]).reshape(-1, 3)
        totals = same.sum(axis=0, dtype=np.int64).tolist()
        return Count(totals[0], totals[1], totals[2] if tokenizer else None)

    kept = Selection(documents, [number for number, reason in enumerate(reasons) if reason is None])
    return kept, Report(count(None), {reason: count(reason) for reason in sorted(filter(None, set(reasons)))})
