"""The documents that a training run names, opened: rows to train and validate on, and held-out text."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from conf.schema import DataConfig
from data.batches import Source
from data.documents import ConsecutiveDocuments, PackedDocuments
from data.mixture import Mixture
from data.sources import Corpus, locate
from data.store import JoinedStreams, Stream, TokenStore, TokenStream, build_store, kept_line, locate_store
from data.streaming import StreamedDocuments
from data.tokenizers import Tokenizer


class Documents:
    """Every source of `data.documents`.

    Attributes:
        content: hash of what `train()` reads, known once that was called: equal contents give equal rows.

    Raises:
        ValueError: on construction, when a source is not there; later, when it cannot be read.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        pairs = data.documents.sources()
        self.corpora = [locate(config) for config, _ in pairs]
        self.weights = [weight for _, weight in pairs]
        self.content = ""

    def prepare(self) -> Iterator[str]:
        """Tokenise what has to be, and tell for people what of it was kept."""
        for corpus in self.corpora:
            kept = self._kept(corpus)
            if not locate_store(kept, self.tokenizer, self._streaming).exists():
                yield f"tokenising {corpus.name} into {locate_store(kept, self.tokenizer, self._streaming)}"
            yield kept_line(kept, self._store(corpus)) + (" (for validation)" if self._streaming else "")

    def train(self) -> Source:
        data, step = self.data, self.data.batch_size * self.data.train_length
        sources: list[Source] = []
        contents = []
        for corpus in self.corpora:
            if self._streaming:
                lengths = [data.train_length] + ([data.curriculum_length] if data.curriculum_length else [])
                streamed = StreamedDocuments(corpus, self.tokenizer, step, lengths)
                sources.append(streamed)
                contents.append(streamed.content)
                continue
            store = self._store(corpus)
            stream = self._split(store)[0]
            consecutive = data.documents.layout == "consecutive"
            sources.append(ConsecutiveDocuments(stream, step) if consecutive else PackedDocuments(stream))
            contents.append(store.content)
        if len(sources) == 1:
            self.content = contents[0]
            return sources[0]
        self.content = hashlib.sha256(repr([contents, self.weights]).encode()).hexdigest()
        return Mixture(sources, self.weights, step if self._streaming else None)

    def validation(self) -> Source:
        """Independent rows of held-out documents, mixed as in training."""
        sources = [PackedDocuments(self._split(self._store(corpus))[1]) for corpus in self.corpora]
        return sources[0] if len(sources) == 1 else Mixture(sources, self.weights)

    def texts(self) -> tuple[TokenStream, TokenStream]:
        """Text to train and to validate in, of the one source: for tasks that hide needles in it."""
        (corpus,) = self.corpora
        store = self._store(corpus)
        self.content = store.content
        return self._split(store)

    def held_out(self) -> Stream:
        """The held-out documents of all sources, one after another."""
        return JoinedStreams.of([self._split(self._store(corpus))[1] for corpus in self.corpora])

    @property
    def _streaming(self) -> bool:
        return self.data.documents.streaming

    def _kept(self, corpus: Corpus) -> Corpus:
        """What a store is made of: of a stream, held-out documents of twice the tokens of a validation."""
        if not self._streaming:
            return corpus
        tokens = 2 * self.data.val_sequences * self.data.train_length
        return replace(corpus, config=replace(corpus.config, streaming=False, max_tokens=tokens))

    def _store(self, corpus: Corpus) -> TokenStore:
        return build_store(self._kept(corpus), self.tokenizer, self._streaming)

    def _split(self, store: TokenStore) -> tuple[TokenStream, TokenStream]:
        """(training, validation); a stream's store is all validation."""
        if self._streaming:
            return store.whole(), store.whole()
        return store.split(self.data.documents.val_fraction)
