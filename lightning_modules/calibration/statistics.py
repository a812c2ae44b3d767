"""What every head does on text of the training length: the norms of its state, its dt, its retention.

Nothing is changed of the model or of its path: states are those that it hands out between two stretches of
text, dt is what its projections give.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.ssd.discretize import discretize
from kernels.ssd.mitigation import NONE
from lightning_modules.backbone import Mamba2LM
from lightning_modules.evaluation.streaming import Reader, Source
from lightning_modules.layer import Mamba2
from lightning_modules.state import ModelState


def state_norms(reader: Reader, source: Source, length: int, stride: int) -> Tensor:
    """Frobenius norm of every head's P x N state after every `stride` tokens and after the last of `length`.

    Returns (rows, points, layers, heads) fp32, on the CPU.
    """
    norms, state = [], None
    for begin in range(0, length, stride):
        state, _ = reader.read(source, state, begin, min(begin + stride, length))
        assert isinstance(state, ModelState)
        states = [layer.ssm for layer in state.layers]
        norms.append(torch.stack([torch.linalg.vector_norm(s, dim=(2, 3)) for s in states], 1).cpu())
    return torch.stack(norms, 1)


def time_steps(reader: Reader, source: Source, length: int) -> tuple[Tensor, Tensor]:
    """dt of every token, after bias, softplus and limits, and the log retention over the whole text.

    Returns dt (rows, length, layers, heads) fp32 and the sum of dt A over the tokens (rows, layers, heads)
    fp64, on the CPU.
    """
    with _recorded(reader.model) as record:
        reader.read(source, None, 0, length)
    dt = torch.stack([torch.cat(layer, 1) for layer in record], 2)
    A = torch.stack([-mixer.A_log.detach().double().exp().cpu() for mixer in mixers(reader.model)])
    return dt, dt.double().sum(1) * A


def mixers(model: Mamba2LM) -> list[Mamba2]:
    return [block.mixer for block in model.backbone.layers]  # type: ignore[misc]


def threshold_table(
    dt: Tensor, log_retention: Tensor, lengths: Sequence[int], retention: float, clamp: float
) -> Tensor:
    """LongMamba's thresholds (arXiv 2504.16053): of heads that remember, the dt below which tokens are passed
    over, so that the rest of a prompt of S tokens decays as much as a text of the training length L did.

        g(S) = the smallest g with S E[dt; dt >= g] <= L E[dt]         global heads only, 0 elsewhere

    A head is global when it keeps more than `retention` of a token over L tokens, on (geometric) average over
    the texts. Of dt the largest, a share `clamp` of all, count as the smallest among them, and always pass.

    Args:
        dt: (rows, L, layers, heads). log_retention: (rows, layers, heads).
        lengths: S, ascending, from L.

    Returns:
        (lengths, layers, heads) fp64.
    """
    train_length = dt.shape[1]
    samples = dt.double().flatten(0, 1).sort(0, descending=True).values
    largest = max(1, round(clamp * len(samples)))
    samples = samples.clamp(max=samples[largest - 1])
    sums = samples.cumsum(0)
    table = []
    for length in lengths:
        allowed = sums[-1] * (train_length / length)
        # rounding of the sums must not cost a token at S = L
        passing = (sums <= allowed * (1 + 1e-9)).sum(0).clamp(min=largest)
        least = samples.gather(0, passing[None] - 1)[0]
        table.append(torch.where(passing == len(samples), 0.0, least))
    is_global = log_retention.mean(0) > torch.tensor(retention, dtype=torch.float64).log()
    return torch.stack(table) * is_global


@contextmanager
def _recorded(model: Mamba2LM) -> Iterator[list[list[Tensor]]]:
    """While open, keeps dt of what the model reads: a list of (rows, tokens, heads) for every layer."""
    record: list[list[Tensor]] = []
    handles = []
    for mixer in mixers(model):
        kept: list[Tensor] = []

        def keep(_: object, __: object, projected: Tensor, mixer: Mamba2 = mixer, kept: list = kept) -> None:
            raw, A = projected[..., -mixer.config.n_heads :], -mixer.A_log.float().exp()
            _, dt = discretize(raw, A, mixer.dt_bias, True, mixer.config.dt_limit, NONE)
            kept.append(dt.cpu())

        record.append(kept)
        handles.append(mixer.in_proj.register_forward_hook(keep))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
