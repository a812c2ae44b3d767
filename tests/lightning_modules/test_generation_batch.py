"""Prompts side by side are as each alone, under every mitigation; a token after many is as after few."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.generate_schema import DecodingConfig
from conf.schema import ModelConfig
from data.tokenizers import ByteTokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.generation.loop import Generation, Generator, Row
from lightning_modules.generation.text import BROKEN
from lightning_modules.mitigations import LayerMitigations
from lightning_modules.state import ModelState
from tests.lightning_modules.made_tokenizers import byte_level
from tests.lightning_modules.test_backbone_pieces import build

CONFIG = ModelConfig(d_model=16, headdim=8, d_state=8, n_layers=2, n_groups=2, chunk_size=16, vocab_size=64)
LENGTHS = [5, 1, 40, 17, 5]
NEW = 12
MITIGATIONS: dict[str, Any] = {
    "none": Mitigation(),
    "forget_more": Mitigation("forget_more", alpha_scale=0.9, insert_scale=0.8),
    "delta_scale": Mitigation("delta_scale", delta_scale=0.5),
    "decay_scale": Mitigation("decay_scale", decay_scale=2.0),
    "token_filter": Mitigation("token_filter", threshold=0.01),
    "state_norm": Mitigation("state_norm", max_norm=0.01, every=4),
    "sliding_window": Mitigation("sliding_window", window=7),
    "hard_reset": Mitigation("hard_reset", every=6),
    "some heads": Mitigation("sliding_window", window=7, heads=(0, 3)),
    "by layer": LayerMitigations((Mitigation(), Mitigation("hard_reset", every=6, heads=(1,)))),
}


@pytest.fixture(scope="module")
def model() -> Mamba2LM:
    return build(CONFIG, seed=0).eval()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 64, length) for i, length in enumerate(LENGTHS)]


def check_states(actual: ModelState, expected: ModelState, check_close: Any) -> None:
    assert torch.equal(actual.position, expected.position)
    for ours, theirs in zip(actual.tensors(), expected.tensors(), strict=True):
        check_close(ours, theirs, 1e-5, "state", floor=1e-3)


def greedy_by_whole_passes(model: Mamba2LM, prompt: np.ndarray, mitigation: Any) -> list[int]:
    """By definition: all tokens so far at once, for every token anew."""
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        for _ in range(NEW):
            last = model(ids, mitigation=mitigation).logits[:, -1]
            ids = torch.cat([ids, last.argmax(1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MITIGATIONS)
def test_a_prompt_in_a_batch_is_as_alone_and_as_whole_passes(
    model: Mamba2LM, prompts: list[np.ndarray], name: str, check_close: Any
) -> None:
    mitigation = MITIGATIONS[name]
    together = model.generate(prompts, max_new_tokens=NEW, mitigation=mitigation)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], max_new_tokens=NEW, mitigation=mitigation)
        assert together.tokens[row] == alone.tokens[0] == greedy_by_whole_passes(model, prompt, mitigation)
        check_states(together.state.rows(torch.tensor([row])), alone.state, check_close)
        whole = torch.tensor([[*prompt.tolist(), *alone.tokens[0]]])
        with torch.no_grad():
            check_states(alone.state, model(whole, mitigation=mitigation).state, check_close)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, "left") for name in MITIGATIONS]
    + [
        (name, side)
        for name in ("none", "state_norm", "sliding_window", "hard_reset")
        for side in ("right", "between")
    ],
)
def test_padding_changes_nothing_even_behind_a_state(
    model: Mamba2LM, prompts: list[np.ndarray], name: str, side: str, check_close: Any
) -> None:
    """Also what it holds does not count: the padding is of tokens that the model knows well."""
    mitigation, width = MITIGATIONS[name], max(LENGTHS)
    ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        places = {
            "left": torch.arange(width - len(prompt), width),
            "right": torch.arange(len(prompt)),
            "between": torch.randperm(width)[: len(prompt)].sort().values,
        }[side]
        ids[row, places], mask[row, places] = torch.from_numpy(prompt), True
    with torch.no_grad():
        before = model(torch.randint(64, (len(prompts), 9)), mitigation=mitigation).state
    padded = model.generate(ids, mask=mask, state=before, mitigation=mitigation, max_new_tokens=4)
    plain = model.generate(prompts, state=before, mitigation=mitigation, max_new_tokens=4)
    assert padded.tokens == plain.tokens
    for ours, theirs in zip(padded.state.tensors(), plain.state.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    one = [before.rows(torch.tensor([row])) for row in range(len(prompts))]
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], state=one[row], mitigation=mitigation, max_new_tokens=4)
        assert padded.tokens[row] == alone.tokens[0]
        check_states(padded.state.rows(torch.tensor([row])), alone.state, check_close)


@pytest.mark.parametrize("name", ["none", "state_norm", "sliding_window", "hard_reset"])
def test_a_row_that_has_ended_changes_no_more(model: Mamba2LM, prompts: list[np.ndarray], name: str) -> None:
    """Rows end at a stop string; from then on their state stays bit for bit, whatever the others do."""
    mitigation = MITIGATIONS[name]
    free = model.generate(prompts, max_new_tokens=NEW, mitigation=mitigation, tokenizer=ByteTokenizer())
    stop = free.texts[2][3]
    settings = DecodingConfig(max_new_tokens=NEW, stop=[stop])
    generator = Generator(model, prompts, settings, tokenizer=ByteTokenizer(), mitigation=mitigation)
    rows = [Row() for _ in prompts]
    frozen: dict[int, list[Tensor]] = {}
    for piece in generator:
        rows[piece.row].add(piece)
        assert generator.state is not None
        for index, row in enumerate(rows):
            if row.finish is not None and len(row.tokens) < len(rows[piece.row].tokens):  # its last is fed
                now = [t[index] for t in generator.state.tensors()]
                before = frozen.setdefault(index, [t.clone() for t in now])
                assert all(map(torch.equal, now, before))
    assert 2 in frozen
    assert len(frozen) < len(prompts)
    for row, text in zip(rows, free.texts, strict=True):
        assert row.text == text.split(stop)[0]
        assert row.finish == ("stop" if stop in text else "length")


@pytest.mark.parametrize("kind", ["bytes", "level"])
def test_a_stop_string_across_the_borders_of_tokens(
    kind: str, prompts: list[np.ndarray], tmp_path: Path
) -> None:
    """One that begins within a token and ends within another ends the text before it, and the same tokens
    are read that would have been without."""
    tokenizer = ByteTokenizer() if kind == "bytes" else byte_level(tmp_path)
    sizes = {"vocab_size": tokenizer.vocab_size, "tie_embeddings": False}
    model = build(ModelConfig(**{**vars(CONFIG), **sizes}), seed=0).eval()
    chosen = torch.zeros(sizes["vocab_size"], 1)  # whole characters of one byte, or tokens of several
    chosen[slice(32, 127) if kind == "bytes" else slice(257, None)] = 50
    with torch.no_grad():
        model.lm_head.weight *= chosen
    settings: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 30, "tokenizer": tokenizer}
    free = model.generate(prompts, **settings)
    text, made = free.texts[2], free.tokens[2]
    borders = {len(tokenizer.decode(made[:count])) for count in range(len(made) + 1)}
    at = next(
        at
        for at in range(5, len(text) - 5)  # broken characters wait for what may make them whole
        if BROKEN not in text[at : at + 5] and (kind == "bytes" or not {at, at + 5} & borders)
    )
    stop = text[at : at + 5]
    first = text.index(stop)
    ended = model.generate(prompts, **settings, stop=[stop])
    assert ended.texts[2] == text[:first]
    assert ended.rows[2].finish == "stop"
    assert 1 < len(ended.tokens[2]) < 30
    assert ended.tokens[2] == free.tokens[2][: len(ended.tokens[2])]
    assert stop in tokenizer.decode(ended.tokens[2])
    assert stop not in tokenizer.decode(ended.tokens[2][:-1])


@pytest.mark.parametrize("length", [1, 3, 16, 1000])
def test_segments_of_any_length_read_alike(
    model: Mamba2LM, prompts: list[np.ndarray], length: int, check_close: Any
) -> None:
    expected = model.generate(prompts, max_new_tokens=NEW)
    actual = model.generate(prompts, max_new_tokens=NEW, segment_length=length)
    assert actual.tokens == expected.tokens
    check_states(actual.state, expected.state, check_close)


def test_samples_do_not_depend_on_neighbours(model: Mamba2LM, prompts: list[np.ndarray]) -> None:
    together = model.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=10)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], max_new_tokens=NEW, temperature=1.0, seed=10 + row)
        assert together.tokens[row] == alone.tokens[0]
    same = model.generate([prompts[0]] * 3, max_new_tokens=NEW, temperature=1.0)
    assert len({tuple(tokens) for tokens in same.tokens}) == 3  # three samples of one prompt
    assert model.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=10).tokens == together.tokens


def test_the_end_of_text_ends_a_row_and_is_not_read(model: Mamba2LM, prompts: list[np.ndarray]) -> None:
    free = model.generate(prompts[:1], max_new_tokens=NEW)
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = free.tokens[0][4]
    ended = model.generate(prompts[:1], max_new_tokens=NEW, tokenizer=tokenizer)
    before = free.tokens[0].index(tokenizer.eos_id)
    assert ended.rows[0].finish == "end"
    assert ended.tokens[0] == free.tokens[0][:before]
    assert ended.state.position.tolist() == [len(prompts[0]) + before]


def test_going_on_from_a_result_is_as_going_on(model: Mamba2LM, prompts: list[np.ndarray]) -> None:
    """A conversation: the state after an answer holds all of it; a state of one row serves many prompts."""
    first = model.generate(prompts[2:3], max_new_tokens=3)
    question = [np.arange(5), np.arange(9)]
    second = model.generate(question, max_new_tokens=4, state=first.state)
    for row, text in enumerate(question):
        whole = np.concatenate([prompts[2], first.tokens[0], text])
        assert second.tokens[row] == model.generate([whole], max_new_tokens=4).tokens[0]
    loss = model(torch.arange(6)[None], first.state).logits.square().mean()
    loss.backward()  # a state from generation is an ordinary one: training may go on from it
    model.zero_grad()


def test_reading_alone_is_a_state(model: Mamba2LM, prompts: list[np.ndarray], check_close: Any) -> None:
    read = model.generate(prompts, max_new_tokens=0)
    assert read.tokens == [[] for _ in prompts]
    assert read.state.position.tolist() == LENGTHS
    again = model.generate([np.array([3])] * 5, max_new_tokens=2, state=read.state)
    expected = model.generate([np.append(prompt, 3) for prompt in prompts], max_new_tokens=2)
    assert again.tokens == expected.tokens
    check_states(again.state, expected.state, check_close)


def live_tensor_bytes() -> int:
    gc.collect()
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is Tensor)


@pytest.mark.parametrize("name", ["none", "sliding_window", "state_norm"])
def test_memory_is_constant(model: Mamba2LM, name: str) -> None:
    """Tensors alive after 20 tokens and after 200, behind prompts of 10 and of 1,000 tokens: the same."""
    held = []
    for length in (10, 1000):
        generator = Generator(
            model, [np.arange(length) % 64], DecodingConfig(max_new_tokens=201, segment_length=64),
            mitigation=MITIGATIONS[name],
        )  # fmt: skip
        for count, _ in enumerate(generator):
            if count in (20, 200):
                held.append(live_tensor_bytes())
    assert len(set(held)) == 1


def test_nan_is_an_error_that_names_the_prompt(prompts: list[np.ndarray]) -> None:
    broken = build(CONFIG, seed=0).eval()
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^prompt 1: NaN or infinity in the logits after 0 new tokens"):
        broken.generate(prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, r"^prompt=\[\]: give at least one$"),
        ([[1], []], {}, r"^prompt 2 of 2 is empty: give at least one token$"),
        ([[1, 64]], {}, r"^prompt 1: token 64: the model's ids are 0 to 63$"),
        ([[-1]], {}, r"^prompt 1: token -1: the model's ids are 0 to 63$"),
        ([[1]], {"stop": ["x"]}, r"^stop=\['x'\]: needs a tokenizer"),
        ([[1]], {"cuda_graph": True}, r"^cuda_graph=True: needs a GPU"),
        ([[1]], {"mask": torch.ones(1, 1)}, r"^mask: must have the shape of ids"),
    ],
)
def test_what_cannot_be_done_is_said(
    model: Mamba2LM, ids: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **settings)


def test_a_state_of_other_rows_or_mitigation_is_refused(model: Mamba2LM, prompts: list[np.ndarray]) -> None:
    state = model.generate(prompts[:2], max_new_tokens=0).state
    with pytest.raises(ValueError, match="state has 2 rows, the batch 3"):
        model.generate(prompts[:3], state=state)
    with pytest.raises(ValueError, match="state belongs to mitigation 'none'"):
        model.generate(prompts[:2], state=state, mitigation=MITIGATIONS["hard_reset"])


def test_result_is_typed(model: Mamba2LM) -> None:
    assert isinstance(model.generate([[1, 2]], max_new_tokens=1), Generation)
