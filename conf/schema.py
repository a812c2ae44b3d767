"""Every setting of a training, its default and its meaning.

Defaults run on a laptop. Nothing here imports torch: a config is parsed and checked in milliseconds.
Each class checks what it can see alone; the root classes check what spans sections.
"""

import math
from dataclasses import dataclass
from typing import Literal

from conf.diagnosis import ProbeConfig
from conf.documents import DocumentsConfig
from conf.fields import option, require, require_at_least, section
from conf.initial_state import InitialStateConfig
from conf.mitigation import MitigationConfig
from conf.passkey import NEEDLE, OPENING, QUESTION
from conf.tasks import IN_TEXT, TASKS, TasksConfig
from conf.zero import DeepSpeedConfig

REFUSED_IN_CONTEXT = {  # mitigations under which a sequence cannot be sharded over ranks
    "state_norm": "clipping is not linear in the state: no piece could begin before those before it",
    "sliding_window": "what enters a piece would be a window of tokens, as long as the window",
}


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclass(kw_only=True)
class ModelConfig:
    """Mamba-2 (arXiv 2405.21060), in the field's own names."""

    d_model: int = option(128, "width of the residual stream")
    n_layers: int = option(2, "number of Mamba-2 blocks")
    d_state: int = option(64, "N, state size per head channel")
    headdim: int = option(32, "P, channels per head; divides expand * d_model")
    expand: int = option(2, "d_inner = expand * d_model")
    n_groups: int = option(1, "G, groups of heads that share B and C; divides the number of heads")
    d_conv: int = option(4, "width of the causal depthwise convolution")
    chunk_size: int = option(64, "tokens per chunk of the scan: speed only, never results")
    vocab_size: int = option(256, "number of token ids; at least the tokenizer's")
    d_has_hdim: bool = option(False, "D per channel instead of per head")
    norm_before_gate: bool = option(False, "RMSNorm before the gate instead of after it")
    tie_embeddings: bool = option(True, "share the embedding with the output head")
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm")
    dt_min: float = option(0.001, "smallest initial dt (log-uniform)")
    dt_max: float = option(0.1, "largest initial dt (log-uniform)")
    dt_init_floor: float = option(1e-4, "initial dt is never below this")
    dt_limit: tuple[float, float] = option((0.0, math.inf), "dt is clamped to this range after softplus")
    A_init_range: tuple[float, float] = option((1.0, 16.0), "initial -A, uniform in this range")
    init_std: float = option(0.02, "standard deviation of the initial embedding")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Width of in_proj's output: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.n_heads

    def __post_init__(self) -> None:
        require_at_least("model", self, 1, "d_model", "n_layers", "d_state", "headdim", "expand", "n_groups")
        require(2 <= self.d_conv <= 8, "model.d_conv", self.d_conv, "must be from 2 to 8 (Mamba-2 uses 4)")
        require_at_least("model", self, 2, "vocab_size")
        require(
            self.d_inner % self.headdim == 0,
            "model.headdim",
            self.headdim,
            f"must divide expand * d_model = {self.d_inner}",
        )
        require(
            self.n_heads % self.n_groups == 0,
            "model.n_groups",
            self.n_groups,
            f"must divide the number of heads, {self.n_heads}",
        )
        require(
            is_power_of_two(self.chunk_size) and self.chunk_size >= 16,
            "model.chunk_size",
            self.chunk_size,
            "must be a power of two of at least 16, e.g. 64",
        )
        require(0 < self.dt_min <= self.dt_max, "model.dt_min", self.dt_min, "needs 0 < dt_min <= dt_max")
        low, high = self.dt_limit
        require(0 <= low < high, "model.dt_limit", self.dt_limit, "needs 0 <= low < high, e.g. [0.0, .inf]")
        low, high = self.A_init_range
        require(0 < low <= high, "model.A_init_range", self.A_init_range, "needs 0 < low <= high")
        require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be positive, e.g. 1e-5")


@dataclass(kw_only=True)
class PasskeyConfig:
    """The passkey task of arXiv 2410.07145, appendix B.1."""

    digits: int = option(5, "digits of the key")
    opening: bool = option(False, "begin with the paper's opening sentence (longer shortest prompt)")
    filler_weight: float = option(0.1, "loss weight of every token outside the answer (the answer has 1)")

    @property
    def fixed_bytes(self) -> int:
        """Bytes of a prompt without filler: opening, needle, question and answer."""
        words = [OPENING] * self.opening + [*NEEDLE, QUESTION]
        return len("".join(words).encode()) + 3 * (1 + self.digits)  # a key is a space and its digits


@dataclass(kw_only=True)
class DataConfig:
    """What the model reads."""

    name: str = option("passkey", f"what to learn: documents, or a task: passkey, {', '.join(TASKS)}")
    tokenizer: str = option("bytes", "bytes, or a Hugging Face tokenizer folder or name")
    train_length: int = option(256, "tokens per training sequence")
    batch_size: int = option(32, "sequences per optimizer step, over all ranks and accumulation steps")
    curriculum_length: int | None = option(None, "train at this shorter length first, at equal tokens a step")
    curriculum_steps: int = option(0, "optimizer steps at curriculum_length")
    val_sequences: int = option(128, "sequences per validation")
    num_workers: int = option(0, "data loader processes")
    passkey: PasskeyConfig = section(PasskeyConfig)
    tasks: TasksConfig = section(TasksConfig)
    documents: DocumentsConfig = section(DocumentsConfig)

    def __post_init__(self) -> None:
        known = ("passkey", "documents", *TASKS)
        require(self.name in known, "data.name", self.name, f"choose from {', '.join(known)}")
        require_at_least("data", self, 1, "train_length", "batch_size", "val_sequences")
        require_at_least("data", self, 0, "curriculum_steps", "num_workers")
        digits = self.passkey.digits
        require(1 <= digits <= 15, "data.passkey.digits", digits, "must be from 1 to 15, e.g. 5")
        require_at_least("data.passkey", self.passkey, 0, "filler_weight")
        if self.tokenizer == "bytes":
            self.require_passkey_fits(self.passkey.fixed_bytes)
        if self.name in IN_TEXT:
            remedy = f"data.name={self.name} hides its needles in one text read whole: leave it out"
            require(not self.documents.streaming, "data.documents.streaming", "true", remedy)
            require(not self.documents.mixture, "data.documents.mixture", "[...]", remedy)
        workers = self.num_workers if self.documents.streaming and self.name == "documents" else 0
        remedy = "data.documents.streaming reads rows in order, in at most 1 process a rank"
        require(workers <= 1, "data.num_workers", workers, remedy)
        if self.curriculum_length is None:
            require(
                self.curriculum_steps == 0,
                "data.curriculum_steps",
                self.curriculum_steps,
                "set data.curriculum_length too, or leave it 0",
            )
        else:
            require(
                self.curriculum_length >= 1 and self.train_length % self.curriculum_length == 0,
                "data.curriculum_length",
                self.curriculum_length,
                f"must divide data.train_length={self.train_length}, so that tokens a step stay equal",
            )

    def require_passkey_fits(self, needed: int) -> None:
        """Refuse lengths in which a passkey prompt, of at least `needed` tokens, has no place."""
        remedy = f"a passkey prompt needs at least {needed} tokens; give it a longer length"
        if self.passkey.opening:
            remedy += " or set data.passkey.opening=false"
        for name in ("train_length", "curriculum_length"):
            length = getattr(self, name)
            fits = self.name != "passkey" or length is None or length >= needed
            require(fits, f"data.{name}", length, remedy)


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a warmup-stable-decay schedule."""

    lr: float = option(2e-3, "peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW betas")
    eps: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.1, "of matrices; A_log, D, dt_bias, norms and biases have none")
    warmup_steps: int = option(50, "linear warmup")
    decay_fraction: float = option(0.1, "last share of max_steps over which lr falls linearly")
    min_lr_ratio: float = option(0.0, "lr at the last step over the peak lr")
    grad_clip: float = option(1.0, "largest gradient norm; 0 switches clipping off")

    def __post_init__(self) -> None:
        require(self.lr > 0 and math.isfinite(self.lr), "optim.lr", self.lr, "must be positive, e.g. 2e-3")
        require_at_least("optim", self, 0, "weight_decay", "warmup_steps", "grad_clip")
        for name in ("decay_fraction", "min_lr_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}", value, "must lie in [0, 1]")


@dataclass(kw_only=True)
class TrainerConfig:
    """How a run is carried out."""

    max_steps: int = option(1000, "optimizer steps")
    accumulate: int = option(1, "micro-batches per optimizer step; divides data.batch_size")
    segment_length: int | None = option(
        None,
        "tokens that a rank reads at a time, recomputed backwards: memory of a segment, exact gradients; "
        "none: all",
    )
    truncate_after: int | None = option(
        None, "segments after which gradients of the state are cut (truncated backpropagation); none: never"
    )
    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "device type")
    devices: int = option(1, "devices per node")
    num_nodes: int = option(1, "nodes")
    context_parallel: int = option(
        1, "ranks that share each sequence, a piece each; divides devices * num_nodes and the lengths"
    )
    strategy: Literal["auto", "ddp", "deepspeed"] = option(
        "auto", "auto: ddp as soon as there are several devices; deepspeed: ZeRO, see section deepspeed"
    )
    precision: Literal["32-true", "bf16-mixed"] = option("32-true", "bf16-mixed: states, decays in fp32")
    cuda_graphs: bool | None = option(
        None,
        "launch a micro-batch, forward and backward, as one CUDA graph; none: where it can be, fits and pays",
    )
    threads: int | None = option(None, "CPU threads of this process; none: all cores")
    log_every: int = option(10, "optimizer steps between logged points")
    val_every: int = option(100, "optimizer steps between validations")
    checkpoint_every: int = option(100, "optimizer steps between checkpoints")
    async_checkpoints: bool = option(
        False, "train on while a checkpoint is written, from a copy of weights and optimizer in CPU memory"
    )
    keep_last: int = option(2, "checkpoints kept")
    keep_stable: bool = option(False, "keep stable.ckpt too, before the decay: longer runs can continue it")
    progress_bar: bool = option(True, "a progress bar with tokens/s when the output is a terminal")

    def __post_init__(self) -> None:
        names = ["max_steps", "accumulate", "devices", "num_nodes", "context_parallel", "log_every"]
        require_at_least("trainer", self, 1, *names, "val_every", "keep_last", "checkpoint_every")
        remedy = f"must divide the ranks, devices * num_nodes = {self.ranks}"
        require(
            self.ranks % self.context_parallel == 0, "trainer.context_parallel", self.context_parallel, remedy
        )
        optional = ("threads", "segment_length", "truncate_after")
        require_at_least("trainer", self, 1, *(name for name in optional if getattr(self, name) is not None))
        needs_segments = self.truncate_after is None or self.segment_length is not None
        remedy = "counts segments: give trainer.segment_length as well"
        require(needs_segments, "trainer.truncate_after", self.truncate_after, remedy)

    def logs_at(self, step: int) -> bool:
        """Whether training metrics are logged after so many optimizer steps."""
        return step % self.log_every == 0 or step == self.max_steps

    @property
    def ranks(self) -> int:
        return self.devices * self.num_nodes

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that read different sequences."""
        return self.ranks // self.context_parallel


@dataclass(kw_only=True)
class TrackingConfig:
    """Where MLflow records the run."""

    enabled: bool = option(True, "record to MLflow")
    uri: str = option("sqlite:///runs/mlflow.db", "SQLite file (local disk only) or an MLflow server URL")
    experiment: str = option("longstate", "MLflow experiment")
    parent_run_id: str | None = option(None, "MLflow run of the study this run belongs to")
    tags: dict[str, str] = option({}, "further tags of the MLflow run")


@dataclass(kw_only=True)
class TrainConfig:
    """One training run."""

    run_dir: str | None = option(None, "where the run lives; none: runs/<config name>-<hash of the config>")
    seed: int = option(0, "seed of initialisation and data")
    print_config: bool = option(False, "print the resolved config and stop")
    init_from: str | None = option(
        None, "start from the weights of this run directory, .ckpt or saved directory; the schedule is new"
    )
    continue_from: str | None = option(
        None,
        "stable.ckpt of a run with fewer trainer.max_steps, else equal: begin there, as if from the start",
    )
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    deepspeed: DeepSpeedConfig = section(DeepSpeedConfig)
    mitigation: MitigationConfig = section(MitigationConfig)
    initial_state: InitialStateConfig = section(InitialStateConfig)
    probe: ProbeConfig = section(ProbeConfig)
    tracking: TrackingConfig = section(TrackingConfig)

    def __post_init__(self) -> None:
        require_at_least("config", self, 0, "seed")
        shares = self.trainer.data_ranks * self.trainer.accumulate
        require(
            self.data.batch_size % shares == 0,
            "data.batch_size",
            self.data.batch_size,
            f"must be a multiple of {self._batch_factors()} = {shares}",
        )
        require(
            self.data.tokenizer != "bytes" or self.model.vocab_size >= 256,
            "model.vocab_size",
            self.model.vocab_size,
            "the bytes tokenizer needs at least 256",
        )
        require(
            self.data.curriculum_steps < self.trainer.max_steps,
            "data.curriculum_steps",
            self.data.curriculum_steps,
            f"must be below trainer.max_steps={self.trainer.max_steps}",
        )
        ids = self.data.tasks.vocabulary
        remedy = f"exceeds model.vocab_size={self.model.vocab_size}; lower it"
        fits = ids is None or ids <= self.model.vocab_size
        require(fits, "data.tasks.vocabulary", ids, remedy)
        self._check_deepspeed()
        self._check_cuda_graphs()
        self._check_initial_state(rows=self.data.batch_size // shares)
        self._check_mitigation()
        if self.trainer.context_parallel > 1:
            self._check_context_parallel()

    def _batch_factors(self) -> str:
        shared = " / context_parallel" if self.trainer.context_parallel > 1 else ""
        return f"devices * num_nodes{shared} * accumulate"

    def _check_context_parallel(self) -> None:
        size, lags, segment = (
            self.trainer.context_parallel,
            self.model.d_conv - 1,
            self.trainer.segment_length,
        )
        name, rule = "trainer.context_parallel", self.mitigation
        reason = REFUSED_IN_CONTEXT.get(rule.name)
        require(reason is None, name, size, f"not under mitigation.name={rule.name}: {reason}")
        some = rule.name == "hard_reset" and bool(rule.heads)
        require(not some, name, size, "not under hard_reset of some heads: each would have its own resets")
        remedy = "not with initial_state.bptt_segments above 1: use longer rows and trainer.segment_length"
        require(self.initial_state.bptt_segments == 1, name, size, remedy)
        for field in ("train_length", "curriculum_length"):
            length = getattr(self.data, field)
            if length is None:
                continue
            require(length % size == 0, f"data.{field}", length, f"must be a multiple of {name}={size}")
            pieces = {length // size} if segment is None else {segment, length // size % segment} - {0}
            remedy = f"leaves a rank {min(pieces)} tokens at a time: model.d_conv needs at least {lags}"
            require(min(pieces) >= lags, f"data.{field}", length, remedy)

    def _check_deepspeed(self) -> None:
        ours = self.deepspeed
        if self.trainer.strategy != "deepspeed":
            for name, default in vars(DeepSpeedConfig()).items():
                unset = f"deepspeed.{name}={'null' if default is None else str(default).lower()}"
                remedy = f"belongs to trainer.strategy=deepspeed: set that, or {unset}"
                require(getattr(ours, name) == default, f"deepspeed.{name}", getattr(ours, name), remedy)
        elif ours.stage == 3:
            # Segments of one sequence are recomputed, each gathering anew; these are read twice without.
            segments = self.initial_state.bptt_segments
            remedy = "stage 3 lets go of parameters that earlier segments still need: use deepspeed.stage=2"
            require(segments == 1, "initial_state.bptt_segments", segments, remedy)
            factor, remedy = self.probe.factor, "the probe reads whole parameters: use deepspeed.stage=2, or "
            remedy += "0 and python -m lightning_modules.diagnose on a checkpoint"
            require(factor == 0, "probe.factor", factor, remedy)

    def graph_obstacle(self) -> tuple[str, str] | None:
        """The setting under which a micro-batch cannot be one CUDA graph, and why; None: it can be."""
        trainer, segments, rule = self.trainer, self.initial_state.bptt_segments, self.mitigation.name
        ranks = trainer.context_parallel
        obstacles = (
            (trainer.accelerator == "cpu", "trainer.accelerator=cpu", "needs a CUDA device"),
            (
                trainer.strategy == "deepspeed",
                "trainer.strategy=deepspeed",
                "whose hooks a graph would not run: use ddp",
            ),
            (ranks > 1, f"trainer.context_parallel={ranks}", "whose ranks talk within a layer"),
            (
                segments > 1,
                f"initial_state.bptt_segments={segments}",
                "whose gradients leave the micro-batch",
            ),
            (
                rule in ("state_norm", "hard_reset"),
                f"mitigation.name={rule}",
                "whose scan asks the host where rows stand",
            ),
        )
        return next(((setting, why) for holds, setting, why in obstacles if holds), None)

    def _check_cuda_graphs(self) -> None:
        obstacle = self.graph_obstacle() if self.trainer.cuda_graphs else None
        if obstacle is not None:
            setting, why = obstacle
            require(False, "trainer.cuda_graphs", "true", f"not with {setting}, {why}; or leave it out")

    def _check_mitigation(self) -> None:
        rule = self.mitigation
        rule.require_single()
        rule.chosen_heads(self.model.n_layers, self.model.n_heads)
        remedy = "give the file itself: python -m lightning_modules.calibrate makes it"
        require(rule.calibration != "auto", "mitigation.calibration", "auto", remedy)
        own = rule.calibration is None or self.init_from is not None
        remedy = "belongs to a checkpoint: start from that one, init_from=PATH"
        require(own, "mitigation.calibration", rule.calibration, remedy)

    def _check_initial_state(self, rows: int) -> None:
        """rows: of a micro-batch."""
        name, value = "initial_state.name", self.initial_state.name
        consecutive = self.data.name == "documents" and self.data.documents.layout == "consecutive"
        if value == "carried":
            # Rows of passkey prompts go on by themselves: one prompt after another, from step to step.
            documents, steps = self.data.name == "documents", self.data.curriculum_steps
            remedy = "needs rows that go on in the next batch: data.documents.layout=consecutive"
            require(consecutive or not documents, name, value, remedy)
            remedy = f"rows end with data.curriculum_steps={steps}: set it to 0"
            require(steps == 0 or not documents, name, value, remedy)
        elif value == "passed":
            remedy = "one consecutive row a micro-batch continues itself: use carried, or more rows"
            require(not consecutive or rows > 1, name, value, remedy)
        elif value in ("noise", "fitted_noise"):
            remedy = "there is no noise of a window of tokens: drop mitigation.name=sliding_window"
            require(self.mitigation.name != "sliding_window", name, value, remedy)


@dataclass(kw_only=True)
class SideBySideConfig:
    """Small runs trained side by side in one process."""

    run_dirs: list[str] = option([], "run directories, each with the config.yaml of a run")

    def __post_init__(self) -> None:
        require(
            bool(self.run_dirs), "run_dirs", self.run_dirs, "give the run directories: run_dirs=[DIR,DIR]"
        )
        once = len(set(self.run_dirs)) == len(self.run_dirs)
        require(once, "run_dirs", self.run_dirs, "give each once")
