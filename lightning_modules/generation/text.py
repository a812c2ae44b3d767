"""Tokens in, text out as soon as it is certain: whole characters only, and no part of a stop string."""

from data.tokenizers import Tokenizer

BROKEN = "\ufffd"  # what tokenizers put in place of a character that is not whole
LONGEST_CHARACTER = 4  # tokens
LONGEST_WAIT = 64  # tokens; what is not whole by then never will be


class TextStream:
    """Decodes a row's tokens as they come. The pieces together are the text of all tokens.

    Only tokens since the last piece are decoded, behind those of that piece, which tell whether a space
    belongs between them: the work for a token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters of these ids' text that were given out
        self._before = 0  # ids that belong to the last piece

    def push(self, token: int) -> str:
        """The text that has become certain."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain, waited = len(text.rstrip(BROKEN)), len(self._ids) - self._before > LONGEST_WAIT
        if certain < len(text) and waited:
            certain = len(text) - 1  # the last may still become whole
        piece, self._told = text[self._told : certain], max(self._told, certain)
        if certain == len(text) and (piece or waited):
            self._restart(self._before, 0)
        elif waited and text.endswith(self._tokenizer.decode(self._ids[-LONGEST_CHARACTER:])):
            self._restart(len(self._ids) - LONGEST_CHARACTER, 1)
        return piece

    def flush(self) -> str:
        """The rest, a broken character included: no more tokens will come."""
        text = self._tokenizer.decode(self._ids)
        piece, self._told = text[self._told :], len(text)
        return piece

    def _restart(self, first: int, untold: int) -> None:
        """Forget the ids before the `first`; of the others' text all but the last characters is told."""
        self._ids = self._ids[first:]
        self._told, self._before = len(self._tokenizer.decode(self._ids)) - untold, len(self._ids)


class StopStrings:
    """Cuts a stream before the first stop string, whatever the pieces it comes in."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""  # what may be the beginning of a stop string

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certainly before any stop string, and whether one is complete."""
        text = self._held + piece
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:  # the one that was complete first, as if characters came one by one
            self._held = ""
            return text[: min(ends)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """What was held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
