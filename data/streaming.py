"""Documents tokenised while training, in an order that seed and row number decide.

A corpus divides into pieces of a few MiB. With b rows a step there are b lanes; row r of a step goes on where
lane r's row of the step before ended. A lane reads whole pieces, one after another: in every epoch the pieces
come in another random order, and lane r takes each b-th. A rank reads the lanes of its own rows alone.

Nothing has to be saved to resume: whatever row is asked for, its lane reads on to it, from its first piece if
need be. How many tokens each finished piece holds is noted in a file of the cache, so that pieces which lie
before a row are passed over unread: a resumed run reads one piece a lane anew. Without that file it resumes
as exactly, but later.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.batches import Batch
from data.documents import cut_rows, hash_seed, mix_words, permute
from data.sources import Corpus, Piece
from data.store import FORMAT, cache_folder
from data.tokenise import hash_text, is_held_out, tokenise
from data.tokenizers import Tokenizer

PIECE_BYTES = 2**22  # of text: what a lane reads anew when a run resumes, half of it on average
MOST_PIECES = 2**16
GROUP = 2**16  # characters that a lane tokenises ahead

Ints = NDArray[np.int64]


class TokenCounts:
    """How many tokens of training finished pieces hold: the same of all runs, seeds and ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, int] = {}

    def load(self) -> None:
        if self.path.is_file():
            for line in re.findall(r"^(\d+ \d+);$", self.path.read_text(), re.MULTILINE):  # whole lines alone
                piece, tokens = line.split()
                self.known[int(piece)] = int(tokens)

    def note(self, piece: int, tokens: int) -> None:
        if piece not in self.known:
            self.known[piece] = tokens
            # A full disk costs a resumed run time, and this one nothing.
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=0) as file:
                    file.write(f"\n{piece} {tokens};\n".encode())  # one write: others append too


class StreamedDocuments:
    """Rows in the manner of `ConsecutiveDocuments`, from the documents themselves, without validation's.

    Memory: of each lane one document and GROUP characters ahead. Rows are asked for in order; going back
    starts a lane again.

    Raises:
        ValueError: on construction, when there are fewer pieces than rows a step.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, tokens_per_step: int, lengths: Sequence[int]
    ) -> None:
        self.corpus, self.tokenizer, self.tokens_per_step = corpus, tokenizer, tokens_per_step
        rows = tokens_per_step // min(lengths)
        # Several pieces a lane where the corpus is small, so that every lane comes by other documents.
        size = max(corpus.size // MOST_PIECES, min(PIECE_BYTES, corpus.size // (4 * rows)), 1)
        self.pieces: list[Piece] = corpus.pieces(size)
        if len(self.pieces) < rows:
            raise ValueError(
                f"data.documents.streaming=true: {corpus.name} divides into {len(self.pieces)} pieces, fewer "
                f"than the {rows} rows of a step that read it side by side; use streaming=false"
            )
        config = corpus.config
        limits = [config.min_tokens, config.max_document_tokens, config.val_fraction]
        names = [(path.name, path.stat().st_size) for path in corpus.files] or corpus.identity()
        about = [FORMAT, names, config.text_field, limits, len(self.pieces), tokenizer.fingerprint]
        self.content = hashlib.sha256(
            json.dumps(about).encode()
        ).hexdigest()  # of names and sizes, not of texts
        key = hashlib.sha256(json.dumps([self.content, corpus.identity()]).encode()).hexdigest()[:24]
        self.counts = TokenCounts(cache_folder() / f"{key}.counts")
        self._lanes: dict[tuple[Any, ...], _Lane] = {}

    def sample(self, length: int, indices: Sequence[int] | Ints, seed: Sequence[int]) -> Batch:
        """Index i is row i % b of step i // b, b = tokens_per_step / length; as `PackedDocuments.sample`."""
        rows = self.tokens_per_step // length
        found = []
        for index in np.asarray(indices, np.int64).tolist():
            step, row = divmod(index, rows)
            key = (tuple(seed), length, row)
            if key not in self._lanes or self._lanes[key].first > step * length - 1:
                if key[:2] not in {lane[:2] for lane in self._lanes}:
                    self._lanes.clear()  # those of a curriculum's last length are read no more
                    self.counts.load()
                self._lanes[key] = _Lane(self, row, rows, seed, max(step * length - 1, 0))
            found.append(self._lanes[key].read(step * length - 1, (step + 1) * length + 1))
        return cut_rows(np.stack(found), self.tokenizer.eos_id)

    def position(self, length: int, index: int, seed: Sequence[int]) -> dict[str, float]:
        """How many tokens its lane has read before row `index`."""
        return {"lane_token": index // (self.tokens_per_step // length) * length}

    def visit(self, number: int, seed: Sequence[int]) -> int:
        """Which piece comes at this place of the order of all pieces, epoch after epoch."""
        epoch, place = divmod(number, len(self.pieces))
        key = mix_words(hash_seed(seed) + np.uint64(epoch))
        return int(permute(np.array([place]), len(self.pieces), key)[0])

    def documents(self, piece: int) -> Iterator[Ints]:
        """Tokens of a piece's documents of training, each followed by the end-of-text token."""
        config = self.corpus.config
        texts = self.corpus.read(self.pieces[piece])
        training = ((text, True) for text in texts if not is_held_out(hash_text(text), config.val_fraction))
        parts, tokens = [], 0
        small = np.min_scalar_type(max(self.tokenizer.vocab_size - 1, self.tokenizer.eos_id))
        for ids, last in tokenise(training, self.tokenizer, GROUP):
            parts.append(ids.astype(small))
            if not last:
                continue
            document = np.concatenate([*parts, np.array([self.tokenizer.eos_id], small)])
            parts = []
            length, longest = len(document) - 1, config.max_document_tokens
            if length >= config.min_tokens and (longest is None or length <= longest):
                tokens += len(document)
                yield document
        self.counts.note(piece, tokens)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lanes": {}}


class _Lane:
    """The tokens of one lane, read forwards: `first` is where what it holds begins."""

    def __init__(
        self, source: StreamedDocuments, row: int, rows: int, seed: Sequence[int], start: int
    ) -> None:
        """start: tokens before this one will not be asked for."""
        self.source, self.row, self.rows, self.seed = source, row, rows, tuple(seed)
        self._visits = self.first = 0
        while (
            tokens := source.counts.known.get(self._next_piece())
        ) is not None and self.first + tokens <= start:
            self.first += tokens
            self._visits += 1
            if self._visits > len(source.pieces) and not self.first:
                break  # no piece holds anything: reading will say so
        self._held: list[Ints] = []
        self._stop = self.first
        self._documents = self._read_on()

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [start, stop); before the first one stands an end-of-text token."""
        if start < 0:
            end = np.array([self.source.tokenizer.eos_id])
            return np.concatenate([end, self.read(0, stop)])
        while self._stop < stop:
            if self._held and self._stop <= start:
                self._held, self.first = [], self._stop  # passed over: not kept
            document = next(self._documents)
            self._held.append(document)
            self._stop += len(document)
        held = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        tokens = held[start - self.first : stop - self.first].astype(np.int64)
        # The last two of a row are the first two of the next.
        self._held, self.first = [held[stop - 2 - self.first :]], stop - 2
        return tokens

    def _read_on(self) -> Iterator[Ints]:
        empty = 0
        while True:
            piece, empty = self._next_piece(), empty + 1
            self._visits += 1
            if self.source.counts.known.get(piece) == 0 and empty <= len(self.source.pieces):
                continue
            for document in self.source.documents(piece):
                empty = 0
                yield document
            if empty > len(self.source.pieces):
                config = self.source.corpus.config
                raise ValueError(
                    f"data.documents.source={config.source}: {empty:,} pieces in turn hold no document of at "
                    f"least data.documents.min_tokens={config.min_tokens} tokens; lower it or streaming=false"
                )

    def _next_piece(self) -> int:
        return self.source.visit(self.row + self._visits * self.rows, self.seed)
