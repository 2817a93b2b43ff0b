"""Text to token ids and back, for any GLM `tokenizer.json` and for the small one packaged here."""

import codecs
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
from typing import Iterable, Mapping

import tokenizers

EOS = "<|endoftext|>"

# In the order of the release, whose ids are 154820, 154821, ...; the first `CONTROL_TOKENS` carry its "special" flag.
SPECIAL_TOKENS = (
    EOS, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "/nothink", "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)
CONTROL_TOKENS = 18
STOP_TOKENS = (EOS, "<|user|>", "<|observation|>")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A byte-level BPE vocabulary with its special tokens; build it with `packaged` or `load`.

    "Special" means every added token of the file, whatever its `special` flag: the release flags `<|user|>` but not
    `<think>`, and neither may be forged by text.
    """

    plain: tokenizers.Tokenizer   # knows no special token, so that no text can spell one
    marked: tokenizers.Tokenizer  # the file as it stands
    specials: Mapping[str, int]

    @classmethod
    def packaged(cls) -> "Tokenizer":
        """The packaged tokenizer: 4,096 entries, trained on the packaged text, special tokens last."""
        assets = importlib.resources.files("glm5_jax.text") / "assets"
        return cls.from_json((assets / "tokenizer.json").read_text(encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a `tokenizer.json` file, or of a checkpoint directory that holds one.

        Raises FileNotFoundError if there is none, ValueError if the file is not a tokenizer.
        """
        file = pathlib.Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a tokenizer.json, or a directory that holds one; found neither")
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
            raise ValueError(f"{file}: expected a tokenizer of the tokenizers library, found: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that the content of a `tokenizer.json` describes."""
        description = json.loads(text)
        specials = {token["content"]: token["id"] for token in description["added_tokens"]}
        # The library's own switch, encode_special_tokens, would still recognise the tokens that are not flagged.
        model = description["model"]
        vocabulary = {entry: id for entry, id in model["vocab"].items() if entry not in specials}
        plain = description | {"added_tokens": [], "post_processor": None, "model": model | {"vocab": vocabulary}}
        return cls(
            plain=tokenizers.Tokenizer.from_str(json.dumps(plain)),
            marked=tokenizers.Tokenizer.from_str(text),
            specials=specials,
        )

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Token ids of `text`; nothing is put before or after them.

        Special tokens spelled in `text` stay ordinary text unless `specials` is true: set it for rendered templates,
        never for what a user or a tool wrote. Raises ValueError (UnicodeEncodeError) for a lone surrogate.
        """
        text.encode("utf-8")  # the library reports a lone surrogate as "must be str"
        encoder = self.marked if specials else self.plain
        return encoder.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) for each token of `encode(text)`: the code points of `text` that the token is a part of.

        The tokens that share one character all name it. Raises ValueError as `encode`.
        """
        text.encode("utf-8")
        encoding = self.plain.encode(text, add_special_tokens=False)
        return [(id, start, end) for id, (start, end) in zip(encoding.ids, encoding.offsets)]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Text of `ids` (any integers, a numpy row too), the inverse of `encode`; `skip_specials` leaves specials out.

        Bytes that are not UTF-8, such as those of a character cut in half, become U+FFFD. Raises ValueError for an id
        outside the vocabulary.
        """
        row, size = [int(id) for id in ids], self.vocab_size
        for position, id in enumerate(row):
            if not 0 <= id < size:
                raise ValueError(f"decode: expected ids in 0..{size - 1}, found {id} at position {position}")
        if skip_specials:
            hidden = set(self.specials.values())
            row = [id for id in row if id not in hidden]
        return self.marked.decode(row, skip_special_tokens=False)

    def bytes_of(self, id: int) -> bytes:
        """The UTF-8 bytes, perhaps of a part of a character only, that `id` stands for.

        Raises ValueError for an id outside the vocabulary, and for a vocabulary that is not byte-level.
        """
        token = self.marked.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise ValueError(f"bytes_of: expected an id in 0..{self.vocab_size - 1}, found {id}")
        if not isinstance(self.marked.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(f"decoder: expected a ByteLevel one, as GLM tokenizers have; found {self.marked.decoder}")
        byte_of = _byte_alphabet()
        # An added token may be spelled with letters outside the alphabet, and then stands for itself.
        known = all(letter in byte_of for letter in token)
        return bytes(byte_of[letter] for letter in token) if known else token.encode("utf-8")

    def stream(self) -> "Detokenizer":
        """A detokenizer to feed ids as they are sampled."""
        return Detokenizer(self)

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included; a model's vocabulary may be padded beyond it."""
        return self.marked.get_vocab_size(with_added_tokens=True)

    def id_of(self, special: str) -> int:
        """Id of a special token by its spelling; raises ValueError if this tokenizer has no such special token."""
        if special not in self.specials:
            raise ValueError(f"special token {special!r}: expected one of {list(self.specials)}")
        return self.specials[special]

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`, which ends every document."""
        return self.id_of(EOS)

    @property
    def config_fields(self) -> dict[str, int | list[int]]:
        """What a checkpoint's config.json says of its tokenizer."""
        return {"eos_token_id": list(self.stop_ids), "pad_token_id": self.eos_id}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: `<|endoftext|>`, `<|user|>`, `<|observation|>`."""
        return tuple(self.id_of(token) for token in STOP_TOKENS)


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """Incremental `decode`: text as soon as its characters are whole. A value: feeding it returns the next one.

    The texts that `feed` returns, and then the one of `close`, together are the `decode` of all ids.
    """

    tokenizer: Tokenizer
    held: bytes = b""  # the first bytes of a character still to be finished, three at most

    def feed(self, ids: Iterable[int]) -> tuple[str, "Detokenizer"]:
        """Text that became certain with `ids`, and the detokenizer behind them; raises ValueError as `bytes_of`."""
        data = self.held + b"".join(self.tokenizer.bytes_of(int(id)) for id in ids)
        text, used = codecs.utf_8_decode(data, "replace", False)
        return text, Detokenizer(self.tokenizer, data[used:])

    def close(self) -> str:
        """U+FFFD if a character was left unfinished, else nothing."""
        return self.held.decode("utf-8", "replace")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letter that spells each byte in a byte-level vocabulary: printable Latin-1 itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
