"""The command from config to text: load, read, generate, save."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import torch

from conf.generate_schema import GenerateConfig
from conf.measure_schema import MeasureConfig
from conf.schema import TrainConfig
from data.tokenizers import Tokenizer, load_tokenizer
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.settle import settle_calibration
from lightning_modules.checkpoints import find_config, load_model
from lightning_modules.conversion.tokenizer_files import has_tokenizer
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.generation.loop import Generator, Row, check_prompts
from lightning_modules.generation.prefill import Prompt, read_prompts
from lightning_modules.generation.prompts import Prompts
from lightning_modules.generation.saved_state import (
    load_state,
    read_header,
    require_writable,
    save_state,
    tokens_read,
)
from lightning_modules.guests.load import guest_config, is_guest
from lightning_modules.measuring import choose_device, show_progress
from lightning_modules.mitigations import LayerMitigations, build_mitigation
from lightning_modules.saying import discard_output
from lightning_modules.state import ModelState


def run(config: GenerateConfig, texts: Prompts) -> None:
    """Write to standard output the text of one prompt as it is made, of several a line of JSON each.

    Raises:
        ValueError: the checkpoint, tokenizer, mitigation, state, device or a prompt cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.save_state is not None:
        require_writable(config.save_state)
    if config.state is not None:
        _require_rows(config, texts, len(tokens_read(read_header(config.state))))
    device = choose_device(config.device)
    trained = _training_of(config)
    model = load_model(config.checkpoint, device=device, dtype=getattr(torch, config.dtype))
    tokenizer = _tokenizer(config, trained, model)
    prompts: list[Prompt] = [tokenizer.encode(text) for text in texts.prompts]
    document = None if texts.document is None else tokenizer.encode(texts.document)
    check_prompts([*prompts, *([] if document is None else [document])], model.config.vocab_size)
    rules = _mitigation(config, trained, model)
    state = None if config.state is None else load_state(config.state, model, rules, device)
    if document is not None:
        state = _read_document(config, model, rules, document, state)
    final = _generate(config, texts, model, tokenizer, rules, prompts, state)
    if config.save_state is not None:
        save_state(config.save_state, final, model)


def _generate(
    config: GenerateConfig,
    texts: Prompts,
    model: Mamba2LM,
    tokenizer: Tokenizer,
    rules: LayerMitigations,
    prompts: list[Prompt],
    state: ModelState | None,
) -> ModelState:
    """Batch after batch; returns the state after the last tokens of the last batch."""
    if hasattr(sys.stdout, "reconfigure"):  # a character that the terminal lacks must not end the text
        sys.stdout.reconfigure(errors="replace")
    speed = _Speed()
    for first, some in _batches(prompts, config.batch_size):
        rows = list(range(first, first + len(some)))
        before = state
        if state is not None and state.batch_size > 1:
            before = state.rows(torch.tensor(rows, device=state.position.device))
        with show_progress("reading", sum(map(len, some))) as on_tokens:
            generator = Generator(
                model,
                some,
                config,
                tokenizer=tokenizer,
                state=before,
                mitigation=rules,
                seeds=[config.seed + row for row in rows],
                on_tokens=on_tokens,
            )
            pieces = iter(generator)
            speed.start()
            # The first piece comes when all is read: the bar ends before there is text.
            head = list(islice(pieces, 1))
            speed.has_read(sum(map(len, some)))
        done = [Row() for _ in some]
        for part in (head, pieces):
            for piece in part:
                row = done[piece.row]
                row.add(piece)
                speed.count += 1
                if not texts.as_json:
                    _write(piece.text + ("\n" if piece.finish else ""))
                elif piece.finish:
                    line = {"prompt": first + piece.row, "text": row.text, "tokens": len(row.tokens)}
                    _write(json.dumps(line | {"finish": row.finish}, ensure_ascii=False) + "\n")
        speed.has_made()
    speed.tell()
    assert generator.state is not None
    return generator.state


def _write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise ValueError(f"standard output: cannot be written ({error.strerror or error})") from None


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for first in range(0, len(prompts), size):
        yield first, prompts[first : first + size]


def _require_rows(config: GenerateConfig, texts: Prompts, rows: int) -> None:
    if rows not in (1, len(texts.prompts)):
        raise ValueError(
            f"state={config.state}: of {rows} rows, for {len(texts.prompts)} prompts: give as many, "
            "or a state of one row, which all go on from"
        )
    if texts.document is not None and rows > 1:
        raise ValueError(
            f"prompt_file={config.prompt_file}: is read once for all prompts, state={config.state} has "
            f"{rows} rows: leave one of them out"
        )


def _read_document(
    config: GenerateConfig,
    model: Mamba2LM,
    rules: LayerMitigations,
    document: Prompt,
    state: ModelState | None,
) -> ModelState:
    """What all prompts go on from."""
    with show_progress("reading the document", len(document)) as on_tokens:
        reader = Reader(model, rules, config.segment_length, on_tokens)
        return read_prompts(reader, [document], state)[0]


def _training_of(config: GenerateConfig) -> TrainConfig | None:
    """The config that the checkpoint was trained with; None where it is unknown. Refuses a guest."""
    checkpoint = Path(config.checkpoint)
    if is_guest(checkpoint):
        raise ValueError(
            f"checkpoint={checkpoint}: a {guest_config(checkpoint).family} of transformers is measured here, "
            "not generated from: use transformers' own generate"
        )
    return find_config(checkpoint)


def _tokenizer(config: GenerateConfig, trained: TrainConfig | None, model: Mamba2LM) -> Tokenizer:
    name = config.tokenizer or (trained.data.tokenizer if trained is not None else None)
    if name is None and has_tokenizer(Path(config.checkpoint)):
        name = config.checkpoint
    if name is None:
        raise ValueError(
            f"tokenizer=None: checkpoint={config.checkpoint} does not tell which it was trained with; "
            "give tokenizer=bytes, a folder or a hub name"
        )
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("data.") if config.tokenizer else str(error)) from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer={name}: has {tokenizer.vocab_size} token ids, the model of "
            f"checkpoint={config.checkpoint} {model.config.vocab_size}: give the one it was trained with"
        )
    return tokenizer


def _mitigation(config: GenerateConfig, trained: TrainConfig | None, model: Mamba2LM) -> LayerMitigations:
    mitigation = config.mitigation
    if mitigation.calibration is not None:
        if trained is None:
            raise ValueError(
                f"mitigation.calibration={mitigation.calibration}: checkpoint={config.checkpoint} was saved "
                "without its training config: give the settings themselves"
            )
        measured = MeasureConfig(
            checkpoint=config.checkpoint,
            segment=config.segment_length,
            device=config.device,
            threads=config.threads,
            mitigation=mitigation,
        )
        with redirect_stdout(sys.stderr):  # it may have to calibrate, and tells of that
            mitigation = settle_calibration(mitigation, measured, trained, model)
    return build_mitigation(mitigation, model.config)


class _Speed:
    """How fast prompts were read and tokens made; told on standard error."""

    def __init__(self) -> None:
        self.count = 0
        self._read, self._reading, self._making, self._since = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def has_read(self, tokens: int) -> None:
        now = time.perf_counter()
        self._read, self._reading, self._since = self._read + tokens, self._reading + now - self._since, now

    def has_made(self) -> None:
        self._making += time.perf_counter() - self._since

    def tell(self) -> None:
        read = f"read {self._read:,} tokens ({self._read / max(self._reading, 1e-9):,.0f}/s)"
        made = f"made {self.count:,} ({self.count / max(self._making, 1e-9):,.0f}/s)" if self.count else ""
        print(", ".join(filter(None, (read, made))), file=sys.stderr)
