"""Text <-> token ids: bytes, or any Hugging Face tokenizer."""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # ./x and ../x are paths


class Tokenizer(Protocol):
    """What tasks and documents ask of a tokenizer. Ids lie in [0, vocab_size).

    `fingerprint` names what `encode` does: equal fingerprints encode every text equally.
    """

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of `text`, int64 (n,), without any special token added."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of every text, in parallel where the tokenizer can."""

    def decode(self, ids: Any) -> str:
        """Text of a sequence of ids, special tokens kept."""


class ByteTokenizer:
    """UTF-8 bytes. Byte 0 occurs in no ordinary text: it ends a document."""

    vocab_size = 256
    eos_id = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        ids = np.asarray(ids, np.int64)
        # A model's vocabulary may be larger: 0xFF is no valid UTF-8 and reads as a replacement mark.
        return np.where(ids < 256, ids, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """Any tokenizer that `transformers.AutoTokenizer` loads without running downloaded code."""

    def __init__(self, name: str) -> None:
        if not HUB_NAME.fullmatch(name) and not Path(name).is_dir():
            raise ValueError(
                f"data.tokenizer={name}: no such folder; give bytes, a tokenizer folder or a hub name"
            )
        from transformers import AutoTokenizer  # imported here: it costs seconds, and bytes need none of it

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"data.tokenizer={name}: loads neither as a folder nor from the hub; "
                f"give bytes, a tokenizer folder or a hub name ({reason})"
            ) from None
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"data.tokenizer={name}: has no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)  # with added tokens, unlike transformers' own vocab_size
        self.fingerprint = self._fingerprint()

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # verbose=False: no warning that a document is longer than the context of the tokenizer's own model.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, np.int64) for ids in encoded]

    def decode(self, ids: Any) -> str:
        text = self._tokenizer.decode(np.asarray(ids, np.int64).tolist())
        assert isinstance(text, str)
        return text

    def _fingerprint(self) -> str:
        """Hash of the files that the tokenizer saves, so that its name and folder do not matter."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(self._tokenizer.save_pretrained(folder)):
                if Path(file).is_file():
                    digest.update(Path(file).read_bytes())
        return digest.hexdigest()


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or a Hugging Face tokenizer by folder or hub name.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has no end-of-text token.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
