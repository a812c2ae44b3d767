"""What the harness' model reads, without the harness: equal to reading every sequence alone and whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.load import from_dict
from conf.mitigation import MitigationConfig
from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.lm_harness.reading import BatchReader
from lightning_modules.mitigations import build_mitigation

CONFIG = ModelConfig(d_model=32, d_state=8, headdim=16, chunk_size=16, tie_embeddings=False, init_std=1.0)
RULES = [
    {"name": "none"},
    {"name": "forget_more", "alpha_scale": 0.99},
    {"name": "sliding_window", "window": 20},
    {"name": "hard_reset", "every": 24},
    {"name": "state_norm", "max_norm": 0.05, "every": 16},
]


def make_reader(rule: dict, segment: int, rows: int) -> BatchReader:
    torch.manual_seed(0)
    model = Mamba2LM(CONFIG).eval()
    mitigation = from_dict(MitigationConfig, rule)
    return BatchReader(model, lambda n: build_mitigation(mitigation, CONFIG, length=n), segment, rows)


def texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=n) for n in lengths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
@pytest.mark.parametrize("segment", [64, 100_000])
def test_padding_batches_and_segments_change_nothing(rule: dict, segment: int) -> None:
    reader = make_reader(rule, segment, rows=4)
    contexts, endings = texts(1, 70, 33, 33, 5, 1, 90), texts(9, 3, 30, 1, 60, 2, 4)
    pairs = list(zip(contexts, endings, strict=True))
    pairs += [(contexts[1], endings[4]), (contexts[1], endings[0])]  # a context that three requests share
    found = reader.likelihoods(pairs)
    for (context, ending), score in zip(pairs, found, strict=True):
        ids = torch.from_numpy(np.concatenate([context, ending]))[None]
        with torch.inference_mode():
            logits = reader.model(ids, mitigation=reader.rule(len(ids[0]))).logits[0, len(context) - 1 : -1]
        log_p = logits.log_softmax(-1).gather(1, torch.from_numpy(ending)[:, None]).sum()
        assert score.log_p == pytest.approx(float(log_p), rel=1e-4, abs=1e-3)
        assert score.greedy == bool((logits.argmax(-1).numpy() == ending).all())


def test_an_empty_continuation_is_certain_and_costs_nothing() -> None:
    reader = make_reader({"name": "none"}, 4096, rows=2)
    (context, other), (ending, nothing) = texts(30, 20), (texts(5)[0], np.empty(0, np.int64))
    alone = reader.likelihoods([(context, ending)])[0]
    assert reader.tokens == 30 + 4
    empty, among, last = reader.likelihoods([(context, nothing), (context, ending), (other, nothing)])
    assert (empty.log_p, empty.greedy) == (last.log_p, last.greedy) == (0.0, True)
    assert among == alone
    assert reader.tokens == 2 * (30 + 4)
    assert reader.likelihoods([(other, nothing)])[0].greedy


def test_a_shared_context_is_read_once() -> None:
    reader = make_reader({"name": "none"}, 4096, rows=8)
    (context,), endings = texts(1000), texts(5, 5, 5, 5)
    reader.likelihoods([(context, ending) for ending in endings])
    assert reader.tokens == 1000 + 4 * 4


PEAK = """
import sys
import numpy as np, torch
from conf.schema import ModelConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.lm_harness.reading import BatchReader
from lightning_modules.memory import peak_memory_mib
torch.set_num_threads(1)
model = Mamba2LM(ModelConfig(d_model=64, d_state=16, headdim=32, vocab_size=4096)).eval()
ids = np.random.default_rng(0).integers(4096, size=int(sys.argv[1]))
reader = BatchReader(model, lambda length: None, segment=2048, rows=4)
scores = reader.likelihoods([(ids, ids[:3]), (ids[:9], ids[:3]), (ids[:1], ids)])
assert all(np.isfinite(score.log_p) for score in scores)
assert reader.tokens > 2 * len(ids)
print(peak_memory_mib(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_is_flat_in_the_length_of_a_request() -> None:
    """A long context and a long text, in processes of their own. The logits of 65,536 tokens would take a
    GiB, their hidden states 16 MiB a layer. Blocks are given back at once, so that what is held is seen."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    peaks = []
    for length in ("4096", "65536"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, length],
            cwd=Path(__file__).parents[2],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 12, peaks
