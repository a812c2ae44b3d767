"""Passkey accuracy: prompts where they should be, counted right, and equal to reading every prompt whole."""

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, PasskeyConfig
from data.layout import Layout
from data.passkey import PasskeyTask
from data.tokenizers import ByteTokenizer
from kernels.ssd import Mitigation
from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation import answers, passkey
from lightning_modules.evaluation.streaming import Reader

SENTENCE = 22  # bytes of the longest filler sentence: a needle may move forward by less
FORGET_MORE = Mitigation(name="forget_more", alpha_scale=0.99, insert_scale=0.9)
TASK = PasskeyTask(ByteTokenizer(), PasskeyConfig())


class PairTokenizer(ByteTokenizer):
    """Bytes, but a digit twice in a row is one token: keys differ in their number of tokens."""

    def encode(self, text: str) -> np.ndarray:
        ids, at = [], 0
        while at < len(text):
            double = text[at].isdigit() and text[at : at + 1] == text[at + 1 : at + 2]
            ids.append(200 + int(text[at]) if double else ord(text[at]))
            at += 2 if double else 1
        return np.array(ids)

    def decode(self, ids: object) -> str:
        return "".join(str(i - 200) * 2 if i >= 200 else chr(i) for i in np.asarray(ids))


@pytest.fixture
def guesser() -> Mamba2LM:
    """An untrained model that answers digits only, so that some of its guesses are right."""
    model = Mamba2LM(
        ModelConfig(d_model=32, d_state=8, headdim=16, chunk_size=16, tie_embeddings=False, init_std=1.0)
    )
    digits = [*range(ord("0"), ord("9") + 1), *range(200, 210)]
    with torch.no_grad():
        other = [i for i in range(256) if i not in digits]
        model.lm_head.weight[other] = 0
    return model.eval()


def read_in_full(
    model: Mamba2LM, layout: Layout, mitigation: Mitigation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, digits and exact of every prompt, without any sharing."""
    ids, answer = layout.ids(0, layout.length), layout.answer(0, layout.length)[:, 1:] > 0
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids), mitigation=mitigation).logits[:, :-1]
    right = logits.argmax(-1).numpy() == ids[:, 1:]
    digits = np.array([r[a].mean() for r, a in zip(right, answer, strict=True)])
    surprise = torch.nn.functional.cross_entropy(
        logits.mT, torch.from_numpy(ids[:, 1:]), reduction="none"
    ).numpy()
    loss = np.array([s[a].mean() for s, a in zip(surprise, answer, strict=True)])
    return loss, digits, np.array([r[a].all() for r, a in zip(right, answer, strict=True)])


@pytest.mark.parametrize(
    ("suite", "mitigation", "segment"),
    [
        ("recent", Mitigation(), 300),
        ("recent", FORGET_MORE, 5000),
        ("recall", Mitigation(), 5000),
        ("recall", FORGET_MORE, 300),
        ("opening", Mitigation(), 700),
        ("tokens of several digits", Mitigation(), 700),
    ],
)
def test_sharing_prefixes_changes_nothing(
    guesser: Mamba2LM, suite: str, mitigation: Mitigation, segment: int
) -> None:
    tokenizer = PairTokenizer() if suite == "tokens of several digits" else ByteTokenizer()
    task = PasskeyTask(tokenizer, PasskeyConfig(digits=2, opening=suite == "opening"))
    if suite == "recent":
        layout = passkey.recent_prompts(task, 400, 160, 30, seed=1)
    else:
        layout, _ = passkey.recall_prompts(task, 400, depths=5, per_depth=6, seed=1)
    length = layout.length
    loss, digits, exact = read_in_full(guesser, layout, mitigation)
    reader = Reader(guesser, mitigation, segment)
    scores = answers.score(reader, layout)

    assert 0 < digits.mean() < 0.5  # a guesser's luck: the comparison below can fail
    np.testing.assert_allclose(scores.tokens, digits, rtol=1e-12)
    np.testing.assert_array_equal(scores.exact, exact)
    np.testing.assert_array_equal(scores.parts, exact)  # a key is one part
    np.testing.assert_allclose(scores.loss, loss, rtol=1e-4)
    assert scores.finite.all()
    assert reader.tokens == answers.tokens_to_read(layout) < layout.ids(0, length).size


class Counter(Mamba2LM):
    """Answers a space with 1, any digit with the next one, and a 9 with NaN."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(d_model=256, headdim=64, tie_embeddings=False))
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(256))

    def hidden(self, ids: Tensor, state: object = None, **kwargs: object) -> tuple[Tensor, None]:  # type: ignore[override]
        hidden = torch.nn.functional.one_hot((ids + 1) % 256, 256).float()
        hidden[ids == ord(" ")] = torch.nn.functional.one_hot(torch.tensor(ord("1")), 256).float()
        hidden[ids == ord("9")] = torch.nan
        return hidden, None


def test_digits_and_exact_match_are_counted_per_prompt() -> None:
    keys = [12345, 12346, 12312, 55555, 19345, 12349]
    layout = TASK.layout(300, keys, np.linspace(0, 300, len(keys)).astype(int))
    scores = answers.score(Reader(Counter(), Mitigation(), 256), layout)
    # 19345 reads a 9 before its last digits; the final 9 of 12349 is never an input.
    np.testing.assert_allclose(scores.tokens, [1.0, 0.8, 0.8, 0.0, 0.0, 0.8])
    assert scores.exact.tolist() == [True, False, False, False, False, False]
    assert scores.finite.tolist() == [True, True, True, True, False, True]
    row = passkey.accuracy(scores)
    assert row["exact"] == pytest.approx(1 / 6)
    assert row["digits"] == pytest.approx(3.4 / 6)
    assert row["prompts"] == 6
    assert row["non_finite"]
    some = passkey.accuracy(scores.select(np.array([1, 1, 0, 0, 0, 0], bool)))
    assert (some["exact"], some["digits"], some["non_finite"]) == (0.5, pytest.approx(0.9), False)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval(right: int, n: int, low: float, high: float) -> None:
    assert answers.wilson_interval(right / n, n) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_recent_prompts_end_alike_at_every_length() -> None:
    window = 256
    trained = passkey.recent_prompts(TASK, window, window, 16, seed=3).ids(0, window)
    for length in (300, 4096, 1_048_576):
        layout = passkey.recent_prompts(TASK, length, window, 16, seed=3)
        np.testing.assert_array_equal(layout.ids(length - window, length), trained)
        assert (layout.branch >= length - window).all()


def test_recent_and_recall_needles_are_spread_as_in_training() -> None:
    n, length = 4000, 256
    batch = TASK.sample(length, range(n), (0, 0))
    texts = [TASK.tokenizer.decode(ids) for ids in batch["ids"]]
    trained = np.array([text.index(" The passkey is") for text in texts])
    recent = passkey.recent_prompts(TASK, 1024, length, n, seed=1).branch - (1024 - length)
    recall, depth = passkey.recall_prompts(TASK, length, 10, n // 10, seed=1)
    for starts in (recent, recall.branch):
        grid = np.arange(length)
        distance = np.abs((trained[:, None] <= grid).mean(0) - (starts[:, None] <= grid).mean(0)).max()
        assert distance < 0.043  # two-sample Kolmogorov-Smirnov, 0.1%
    assert np.unique(depth).tolist() == pytest.approx([(i + 0.5) / 10 for i in range(10)])


def test_depths_lie_where_they_are_named() -> None:
    length, depths = 4096, 8
    layout, depth = passkey.recall_prompts(TASK, length, depths, 50, seed=1)
    filler = length - TASK.fixed_length()
    for value in np.unique(depth):
        starts = layout.branch[depth == value]
        low, high = (value - 0.5 / depths) * filler, (value + 0.5 / depths) * filler
        assert low <= starts.min() < starts.max() < high + SENTENCE
        assert starts.max() - starts.min() > 0.8 * filler / depths  # spread over its bin


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()], ids=["bytes", "unequal keys"])
def test_a_grid_reads_what_it_shares_once(guesser: Mamba2LM, tokenizer: ByteTokenizer) -> None:
    task, length = PasskeyTask(tokenizer, PasskeyConfig()), 8192
    for layout, most in (
        (passkey.recall_prompts(task, length, 10, 1, seed=1)[0], 6.1),
        (passkey.recent_prompts(task, length, 512, 10, seed=1), 1.6),
    ):
        reader = Reader(guesser, Mitigation(), 4096)
        answers.score(reader, layout)
        assert 1 < reader.tokens / length <= most
    # At the lengths that matter nothing is lost to reading rows side by side.
    longest = 262_144
    assert answers.tokens_to_read(passkey.recall_prompts(task, longest, 10, 1, seed=1)[0]) <= 6.1 * longest
    assert answers.tokens_to_read(passkey.recent_prompts(task, longest, 8192, 10, seed=1)) <= 1.6 * longest


def test_prompts_follow_the_seed_and_nothing_else() -> None:
    one, again, other = (passkey.recent_prompts(TASK, 300, 256, 8, seed=s).ids(0, 300) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(1).all()
    trained = {
        ids.tobytes() for seed in range(4) for ids in TASK.sample(256, range(64), (seed, 0))["ids"].numpy()
    }
    asked = passkey.recent_prompts(TASK, 256, 256, 64, seed=1).ids(0, 256)
    assert not trained & {ids.tobytes() for ids in asked}
