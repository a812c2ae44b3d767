"""Tokenizers that cut characters into pieces, made on the spot."""

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.tokenizers import Tokenizer, load_tokenizer


def byte_level(folder: Path) -> Tokenizer:
    """As GPT-2's and GPT-NeoX's: text is bytes, tokens are any runs of bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the end of the day ", "你好 你们 €uro € "] * 20, trainer)
    return _saved(backend, folder)


def byte_fallback(folder: Path) -> Tokenizer:
    """As Llama 2's: words with a mark for the space before them, and bytes for what has no token."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghi", "▁a", "▁b"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _saved(backend, folder)


def _saved(backend: Backend, folder: Path) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(str(folder))
