"""Token ids as text that can be shown: nothing invisible, no control characters, no broken UTF-8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nemo_kd.config import ConfigError
from nemo_kd.data.tokenizer import load_tokenizer
from nemo_kd.nemo_archive import ArchiveError, open_tokenizer
from nemo_kd.terminal import printable

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
BLANKS = "".join(MARKS)
_SENTENCEPIECE_SPACE = "▁"


def tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, in a model's folder, or in a .nemo archive.

    Raises:
        ConfigError: there is none; DataError: it cannot be loaded.
    """
    try:
        with open_tokenizer(Path(path).expanduser()) as folder:
            return load_tokenizer(folder)
    except ArchiveError as error:
        raise ConfigError(f"--tokenizer: {error}") from error


class TokenText:
    """The bytes and the visible text of token ids; without a tokenizer `#id`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {}
        self._byte_level = self._sentencepiece = False
        if tokenizer is not None:
            self._added = {
                index: token.content for index, token in tokenizer.added_tokens_decoder.items()
            }
            decoder = tokenizer.backend_tokenizer.decoder
            kind = "" if decoder is None else decoder.__getstate__().decode()
            self._byte_level = '"ByteLevel"' in kind
            self._sentencepiece = _SENTENCEPIECE_SPACE in kind or '"Metaspace"' in kind

    def raw(self, token_id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole characters."""
        if self._tokenizer is None:
            return f"#{token_id} ".encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.convert_ids_to_tokens(int(token_id))
        if piece is None:
            return f"#{token_id}".encode()  # padding of the vocabulary
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if self._sentencepiece:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            piece = piece.replace(_SENTENCEPIECE_SPACE, " ")
        return piece.encode()

    def visible(self, token_id: int, pending: bytes = b"") -> str:
        """The token on one line, spaces and line breaks as signs.

        Args:
            pending: the first bytes of a character that the token may complete.
        """
        if self._tokenizer is None:
            return f"#{token_id}"
        return marked(decoded(pending, self.raw(token_id))[0])

    def of(self, token_ids: Sequence[int], pending: bytes = b"") -> str:
        """The text of tokens that follow each other and the first bytes of a character."""
        return decoded(pending, b"".join(map(self.raw, token_ids)))[0]

    def along(self, token_ids: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """(text, first bytes of a character that came before) of tokens that follow each other; see `decoded`."""
        pending = b""
        for token_id in token_ids:
            text, unfinished = decoded(pending, self.raw(token_id))
            yield text, pending
            pending = unfinished


def decoded(pending: bytes, raw: bytes) -> tuple[str, bytes]:
    """(text of a token that follows an unfinished character, the unfinished character at its end).

    Bytes that are no characters, or not yet, appear as `⟨E2 82⟩`; control characters and other invisible ones as
    `\\x1b` and `\\u200b`. Blanks and line breaks are left.
    """
    content, text = pending + raw, ""
    start = len(pending)
    unfinished = _unfinished(content)
    end = len(content) - unfinished
    if end < start:  # still the same character
        return _hex(raw), content
    position = 0
    while position < end:
        try:
            text += printable(content[position:end].decode(), BLANKS)
            break
        except UnicodeDecodeError as error:
            text += printable(content[position : position + error.start].decode(), BLANKS)
            # What was pending has been shown with the token before.
            broken = content[max(start, position + error.start) : position + error.end]
            text += _hex(broken) if broken else ""
            position += error.end
    return text + (_hex(content[end:]) if unfinished else ""), content[end:]


def marked(text: str) -> str:
    """The text in one line, with signs for its blanks and line breaks."""
    return "".join(MARKS.get(character, character) for character in text)


def _unfinished(content: bytes) -> int:
    """How many bytes at the end begin a character without ending it."""
    for length in range(1, min(3, len(content)) + 1):
        lead = content[-length]
        if lead & 0xC0 != 0x80:  # no continuation byte
            wanted = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC2 else 1
            return length if length < wanted and lead < 0xF5 else 0
    return 0


def _hex(raw: bytes) -> str:
    return f"⟨{raw.hex(' ').upper()}⟩"


def _byte_level_alphabet() -> dict[str, int]:
    """The characters in which GPT-2's byte-level vocabularies write bytes: printable Latin-1 as itself, the rest from
    U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_level_alphabet()
