"""A user's own text in place of what training held out, and perplexity by position of whole documents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.measure_schema import EvaluateConfig
from conf.schema import DataConfig, DocumentsConfig
from data.sources import locate
from data.store import Stream, build_store
from data.tokenizers import Tokenizer
from lightning_modules.evaluation.loss import held_out_documents
from lightning_modules.evaluation.splits import draw_seed
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.evaluation.suites import Rule

FACTORS = (64, 32, 16, 8, 4, 2, 1)  # of the training length, without a setting
STREAM = 0x7E54


def text_stream(config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer) -> Stream:
    """All of `text.source`, or the documents that training held out. Raises ValueError if there are none."""
    text = config.text
    if text.source is None:
        return held_out_documents(data, tokenizer, config.split)
    documents = DocumentsConfig(
        source=text.source, subset=text.subset, split=text.split, text_field=text.text_field
    )
    try:
        return build_store(locate(documents), tokenizer).whole()
    except ValueError as error:
        raise ValueError(str(error).replace("data.documents.", "text.")) from None


@dataclass(frozen=True)
class PerplexitySuite:
    """`starts`: of documents in `stream`, each read from its beginning for `length` tokens."""

    stream: Stream
    starts: NDArray[np.int64]
    text: str
    length: int
    bucket: int
    train_length: int

    @property
    def tokens(self) -> int:
        return len(self.starts) * self.length

    def run(self, reader: Reader, rule: Rule) -> dict[str, Any]:
        """Means over buckets of positions, with 95% intervals (Student's t) over documents."""
        reader.mitigation = rule(self.length)
        n, buckets = len(self.starts), -(-self.length // self.bucket)
        total, count = np.zeros((n, buckets)), np.zeros(buckets)
        for first, losses in reader.losses(self._source, self.length):
            index = np.arange(first - 1, first - 1 + losses.shape[1]) // self.bucket
            values = losses.double().cpu().numpy()
            for i in np.unique(index):
                total[:, i] += values[:, index == i].sum(1)
                count[i] += (index == i).sum()
        edges = np.arange(buckets) * self.bucket
        position = (edges + 1 + np.minimum(edges + self.bucket, self.length)) / 2
        measured = _spread(total / count)
        result = {
            "text": self.text,
            "documents": n,
            "length": self.length,
            "bucket": self.bucket,
            "position": position.tolist(),
            **measured,
            "non_finite": None in measured["loss"],
        }
        return result | {"summary": self._summary(result)}

    def _source(self, begin: int, end: int) -> NDArray[np.int64]:
        return self.stream.take(self.starts[:, None] + np.arange(begin, end))

    def _summary(self, result: dict[str, Any]) -> str:
        inside, last = ends(result, self.train_length)
        return (
            f"Perplexity of {result['documents']} documents ({self.text}): {_number(inside)} within the "
            f"training length, {_number(last)} in the last quarter of {self.length:,} tokens."
        )


def ends(result: dict[str, Any], train_length: int) -> tuple[float | None, float | None]:
    """Perplexity within the training length, and over the last quarter; None where not finite."""
    position = np.array(result["position"])
    loss = np.array([np.nan if value is None else value for value in result["loss"]])
    parts = (position <= train_length, position > 0.75 * result["length"])
    values = [float(np.exp(loss[part].mean())) for part in parts]
    return values[0] if np.isfinite(values[0]) else None, values[1] if np.isfinite(values[1]) else None


def metrics(result: dict[str, Any] | None, train_length: int) -> dict[str, float]:
    if result is None:
        return {}
    numbers = dict(zip(("in_length", "last_quarter"), ends(result, train_length), strict=True))
    return {f"perplexity/{name}": value for name, value in numbers.items() if value is not None}


def plan_perplexity(config: EvaluateConfig, data: DataConfig, tokenizer: Tokenizer) -> PerplexitySuite:
    """Choose documents. Raises ValueError where too few are long enough."""
    settings, train_length = config.perplexity, data.train_length
    stream = text_stream(config, data, tokenizer)
    starts, sizes = stream.documents()
    wanted = [settings.length] if settings.length else [factor * train_length for factor in FACTORS]
    length = next((n for n in wanted if (sizes > n).sum() >= settings.documents), wanted[-1])
    enough = np.flatnonzero(sizes > length)
    if len(enough) < settings.documents:
        source = config.text.source or "the documents that training held out"
        raise ValueError(
            f"perplexity.documents={settings.documents}: only {len(enough)} documents of {source} have more "
            f"than {length:,} tokens; ask for fewer or shorter ones, or give another text.source"
        )
    rng = np.random.default_rng([STREAM, draw_seed(config.seed, config.split)])
    chosen = np.sort(rng.choice(enough, settings.documents, replace=False))
    bucket = settings.bucket or max(1, train_length // 4)
    if bucket > min(length, train_length):
        raise ValueError(
            f"perplexity.bucket={bucket}: exceeds {min(length, train_length)}, the shorter of the training "
            "length and the documents' length; lower it"
        )
    text = config.text.source or "held-out documents"
    return PerplexitySuite(stream, starts[chosen], text, length, bucket, train_length)


def _spread(rows: NDArray[np.float64]) -> dict[str, list[float | None]]:
    """Mean loss of each bucket over documents, its interval, and the mean's perplexity; rows (n, buckets)."""
    n, mean = len(rows), rows.mean(0)
    half = np.full_like(mean, np.nan)
    if n > 1:
        from scipy.stats import t

        half = t.ppf(0.975, n - 1) * rows.std(0, ddof=1) / np.sqrt(n)
    curves = {"loss": mean, "loss_low": mean - half, "loss_high": mean + half, "perplexity": np.exp(mean)}
    return {name: [float(x) if np.isfinite(x) else None for x in values] for name, values in curves.items()}


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
