"""A look beyond the training length at every validation: does what is trained here collapse?"""

import sys
from typing import Any

import lightning.pytorch as pl

from conf.diagnosis import ThresholdsConfig
from conf.schema import TrainConfig
from data.module import TokenDataModule
from lightning_modules.diagnosis.conclusion import collapse_metrics, judge_loss, judge_needles
from lightning_modules.diagnosis.needles import Needles, doubled_lengths, plan_needles
from lightning_modules.diagnosis.probe import StateProbe
from lightning_modules.diagnosis.prompts import filler_source
from lightning_modules.diagnosis.reading import read_prompt
from lightning_modules.evaluation.loss import held_out_text
from lightning_modules.evaluation.splits import draw_seed
from lightning_modules.evaluation.streaming import Reader
from lightning_modules.language_model import LanguageModel

SEGMENT = 4096  # tokens of a forward pass, over all rows
SAMPLES = 32  # measured states beyond the training length


class OverLengthProbe(pl.Callback):
    """Adds collapse/position, collapse/loss_ratio, collapse/max_head_rms and collapse/solved to the metrics
    of each validation, where a sweep finds them as objectives; warns once when the model collapses.

    Judged as by `lightning_modules.diagnose` with its default thresholds, on fewer prompts, of the validation
    split. Must stand before `LogMetrics` among the callbacks. On several ranks each reads the same.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.thresholds = config, ThresholdsConfig()
        self.length = config.probe.factor * config.data.train_length
        self.warned = False
        self._needles: Needles | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warned = state_dict["warned"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose what will be read. Raises ValueError if the held-out documents are too short."""
        data, settings = self.config.data, self.config.probe
        module: TokenDataModule = trainer.datamodule  # type: ignore[attr-defined]
        seed = draw_seed(self.config.seed, "validation")
        if data.name == "passkey":
            self._needles = plan_needles(data, module.tokenizer, settings.prompts, seed)
            self._source = filler_source(module.tokenizer, 1)
        else:
            name = "probe.factor * data.train_length"
            self._source, _ = held_out_text(
                data, module.tokenizer, "validation", self.length, settings.prompts, self.config.seed, name
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        with trainer.precision_plugin.forward_context():
            collapse, numbers = self._look(pl_module)
        pl_module.val_metrics |= numbers
        if collapse["position"] is not None and not self.warned and trainer.is_global_zero:
            self.warned = True
            print(
                f"warning: step {trainer.global_step}: collapse at {collapse['position']:,} tokens by "
                f"{collapse['by']} (trained at {self.config.data.train_length:,}): "
                f"python -m lightning_modules.diagnose checkpoint={trainer.default_root_dir} tells more",
                file=sys.stderr,
                flush=True,
            )

    def _look(self, module: LanguageModel) -> tuple[dict[str, Any], dict[str, float]]:
        train_length = self.config.data.train_length
        reader = Reader(module.model, module.mitigation, SEGMENT)
        measures = read_prompt(
            reader,
            StateProbe(module.model),
            self._source,
            train_length=train_length,
            length=self.length,
            stride=max(1, self.length // SAMPLES),
            bucket=max(1, train_length // 4),
        )
        if self._needles is None:
            vocab = self.config.model.vocab_size
            collapse = judge_loss(measures.loss, train_length, vocab, "documents", self.thresholds)
        else:
            lengths = doubled_lengths(train_length, self.length)
            rows = [self._needles.ask(reader, length) for length in lengths]
            collapse = judge_needles(rows, [], self.thresholds)
        return collapse, collapse_metrics(collapse, measures)
