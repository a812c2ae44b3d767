"""The tuning cache and what fills it."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import tuning
from kernels.tuning import Config, bucket, entry, forced, pick, recorded, store
from kernels.warmup import Tuned, tuned

CONFIGS = (Config(num_warps=4), Config(num_warps=8), Config(num_stages=3, meta={"BLOCK": 64}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LONGSTATE_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


def test_the_first_config_is_the_default() -> None:
    assert pick("k", CONFIGS, N=128) is CONFIGS[0]
    assert CONFIGS[2].settings() == {"BLOCK": 64, "num_warps": 4, "num_stages": 3}


def test_stored_choices_are_found_by_their_key_and_merge() -> None:
    store({entry("k", N=128, P=64): 1})
    path = store({entry("k", N=64, P=64): 2})
    assert pick("k", CONFIGS, P=64, N=128) is CONFIGS[1]
    assert pick("k", CONFIGS, P=64, N=64) is CONFIGS[2]
    assert pick("k", CONFIGS, P=64, N=16) is CONFIGS[0]
    assert pick("k", CONFIGS[:1], P=64, N=128) is CONFIGS[0]  # the kernel has lost configs since
    assert json.loads(path.read_text()) == {"k N=128 P=64": 1, "k N=64 P=64": 2}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_forced_by_key_by_kernel_and_for_all() -> None:
    store({entry("k", N=1): 1})
    with forced("*", 2):
        assert pick("k", CONFIGS, N=1) is CONFIGS[2]
        assert pick("k", CONFIGS[:2], N=1) is CONFIGS[0]  # modulo their number
        with forced("k", 0):
            assert pick("k", CONFIGS, N=1) is CONFIGS[0]
            with forced(entry("k", N=1), 1):
                assert pick("k", CONFIGS, N=1) is CONFIGS[1]
                assert pick("k", CONFIGS, N=2) is CONFIGS[0]
                assert pick("other", CONFIGS, N=1) is CONFIGS[2]
    assert pick("k", CONFIGS, N=1) is CONFIGS[1]


def test_recorded_lists_what_was_picked() -> None:
    with recorded() as outer:
        pick("a", CONFIGS, N=1)
        with recorded() as inner:
            pick("b", CONFIGS[:2], N=1)
    pick("c", CONFIGS, N=1)
    assert outer == {"a N=1": CONFIGS, "b N=1": CONFIGS[:2]}
    assert inner == {"b N=1": CONFIGS[:2]}


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 4096, 4097)] == [1, 2, 4, 4, 8, 4096, 8192]


def test_warmup_keeps_the_fastest_that_works_kernel_by_kernel() -> None:
    """Two kernels: the second is fast only beside the first one's best, and one setting cannot run."""

    def run(inputs: Any) -> None:
        run.a = pick("a", CONFIGS, N=1)  # type: ignore[attr-defined]
        run.b = pick("b", CONFIGS[:2], N=1)  # type: ignore[attr-defined]
        pick("alone", CONFIGS[:1], N=1)

    def timer(call: Any, sets: list[Any], seconds: float) -> list[float]:
        call(sets[0])
        if run.a is CONFIGS[2]:  # type: ignore[attr-defined]
            raise RuntimeError("out of resource: shared memory")
        best = run.a is CONFIGS[1] and run.b is CONFIGS[1]  # type: ignore[attr-defined]
        return [1.0 if best else 3.0 - (run.a is CONFIGS[1])] * 3  # type: ignore[attr-defined]

    class Call:
        def prepared(self, given: Any, dy: Any) -> Any:
            return given

        __call__ = staticmethod(run)

    op = SimpleNamespace(
        name="op", ours=run, call=lambda run: Call(), inputs=lambda shape, device: {"x": torch.ones(1)}
    )
    found = tuned(op, "T1", 0.1, set(), timer)
    assert found == [Tuned("a N=1", "op", "T1", (3.0, 2.0, None)), Tuned("b N=1", "op", "T1", (2.0, 1.0))]
    assert [r.best for r in found] == [1, 1]
    assert tuned(op, "T1", 0.1, {"a N=1", "b N=1"}, timer) == []
    assert Tuned("c", "op", "T1", (None, None)).best is None
