"""Rebuild what `assets/` holds: the packaged text, chosen from Python's help topics, and the tokenizer trained on it.

    python3.11 -m glm5_jax.text.build_assets

The text differs from one Python to the next, hence the pinned version; the tests pin the result.
"""

import json
import pathlib
import platform
import pydoc_data.topics
import re
from typing import Iterable, Mapping

import tokenizers

from glm5_jax.text.tokenizer import CONTROL_TOKENS, SPECIAL_TOKENS

SOURCE_PYTHON = "3.11.7"
TEXT_BYTES = 300_000
VOCAB_SIZE = 4096

# How the released tokenizer cuts text into words before merging: contractions, a word with at most one leading mark,
# up to three digits, a run of marks with the line ends that follow, line ends with the blanks before them, blanks.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def select_topics(topics: Mapping[str, str], limit_bytes: int, max_shared: float = 0.1) -> dict[str, str]:
    """Whole topics, shortest first, up to `limit_bytes` of UTF-8; the result is sorted by title.

    Long topics repeat short ones (`compound` contains `if`, `while`, `for`). One is left out when more than
    `max_shared` of its characters stand in paragraphs already taken, or a held-out part would not be unseen.
    """
    chosen: dict[str, str] = {}
    taken: set[str] = set()
    size = 0
    for title, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        shared = sum(len(paragraph) for paragraph in paragraphs if paragraph in taken)
        if shared > max_shared * sum(map(len, paragraphs)):
            continue
        size += len(text.encode("utf-8"))
        if size > limit_bytes:
            break
        taken.update(paragraphs)
        chosen[title] = text
    return dict(sorted(chosen.items()))


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries: 256 bytes, merges, then `SPECIAL_TOKENS` in order.

    Raises ValueError if the texts do not yield that many merges.
    """
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    for index, token in enumerate(SPECIAL_TOKENS):
        added = tokenizers.AddedToken(token, normalized=False, special=index < CONTROL_TOKENS)
        if added.special:
            trained.add_special_tokens([added])
        else:
            trained.add_tokens([added])
    if trained.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size: expected {vocab_size} entries, the texts yield {trained.get_vocab_size()}")
    return trained


def main() -> None:
    if platform.python_version() != SOURCE_PYTHON:
        raise SystemExit(f"the packaged text is that of Python {SOURCE_PYTHON}, this is {platform.python_version()}: "
                         f"run this with Python {SOURCE_PYTHON}")
    assets = pathlib.Path(__file__).parent / "assets"
    topics = select_topics(pydoc_data.topics.topics, TEXT_BYTES)
    lines = [json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in topics.items()]
    (assets / "python_topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    trained = train_bpe(topics.values(), VOCAB_SIZE)
    (assets / "tokenizer.json").write_text(trained.to_str(pretty=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
