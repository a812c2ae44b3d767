"""Peak memory, step time and what to change, for one device of a training."""

from dataclasses import dataclass, replace

from conf.schema import TrainConfig
from lightning_modules.planning import sizes

GIB = 2**30
USABLE = 0.92  # of a device's memory: the rest is fragmentation and what libraries take
SHORTEST_SEGMENT = 512
SLAB_BYTES = 128 * 2**20  # states and gradients that the scan's backward pass holds on a GPU, at least
MOST_SEGMENTS = 16  # in one graph: longer ones have not been measured, and take long to capture
HOST_SECONDS = 0.007  # to launch a layer forward and backward on a GPU, any tokens: 5 to 10 ms measured


@dataclass(frozen=True)
class Device:
    """memory in bytes; flops: of a large matrix product in the run's precision, a second; efficiency: the
    share of it that a step reaches (docs/benchmarks.md: 51 to 60% on an H200, half on a CPU)."""

    name: str
    memory: float
    flops: float
    on_gpu: bool
    efficiency: float = 0.5


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they hold, at the peak of a step; seconds of an optimizer step."""

    parameters: int
    gradients: int
    optimizer: int
    cast_weights: int  # bf16 copies of matrices, within a forward pass
    borders: int  # states between segments
    activations: int
    graphs: int  # what CUDA graphs keep from everything else
    tokens: int  # ids, targets, weights, losses, log-sum-exps of the whole rows
    device_seconds: float  # to compute the step
    host_seconds: float  # to launch it, kernel by kernel; 0 on a CPU
    graphed: bool  # launched as graphs
    tokens_per_step: int

    @property
    def peak(self) -> int:
        held = self.parameters + self.gradients + self.optimizer + self.cast_weights
        return held + self.borders + self.activations + self.graphs + self.tokens

    @property
    def seconds(self) -> float:
        return self.device_seconds if self.graphed else max(self.device_seconds, self.host_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens_per_step / self.seconds


def rows_of(config: TrainConfig) -> int:
    """Rows of one micro-batch that a device reads, or reads a piece of."""
    return max(1, config.data.batch_size // (config.trainer.accumulate * config.trainer.data_ranks))


def piece_of(config: TrainConfig) -> int:
    """Tokens of a row that a device reads."""
    return config.data.train_length // config.trainer.context_parallel


def segments_of(config: TrainConfig) -> int:
    """Pieces that a device reads of a row, one after the other."""
    return -(-piece_of(config) // (config.trainer.segment_length or piece_of(config)))


def tokens_at_once(config: TrainConfig) -> int:
    """Tokens whose activations a device holds together."""
    return rows_of(config) * min(config.trainer.segment_length or piece_of(config), piece_of(config))


def shares(config: TrainConfig) -> tuple[int, int, int]:
    """Over how many devices parameters, gradients and optimizer states are sharded. Parameters of ZeRO-3 are
    held whole while a segment is differentiated."""
    if config.trainer.strategy != "deepspeed":
        return 1, 1, 1
    ranks, stage = config.trainer.ranks, config.deepspeed.stage
    whole = config.trainer.segment_length is not None
    return ranks if stage == 3 and not whole else 1, ranks if stage >= 2 else 1, ranks


def estimate(config: TrainConfig, device: Device) -> Estimate:
    """What one device holds and takes. A step's rows are shared by all devices."""
    return _estimate(config, device, graphed=why_eager(config, device) is None)


def why_eager(config: TrainConfig, device: Device) -> str | None:
    """What keeps `trainer.cuda_graphs` off on this device; None: micro-batches become CUDA graphs."""
    if not device.on_gpu:
        return "no CUDA device"
    asked, obstacle = config.trainer.cuda_graphs, config.graph_obstacle()
    if asked is not None:
        return None if asked else "trainer.cuda_graphs=false"
    if obstacle is not None:
        return obstacle[0]
    segments = segments_of(config)
    if segments > MOST_SEGMENTS:
        return f"a row in {segments} segments, more than {MOST_SEGMENTS}"
    graphed = _estimate(config, device, graphed=True)
    if graphed.device_seconds >= graphed.host_seconds:
        return f"{tokens_at_once(config):,} tokens at a time are launched faster than computed"
    if not fits(graphed, device):
        return f"they would need {graphed.peak / GIB:.1f} GiB of {USABLE * device.memory / GIB:.1f}"
    return None


def _estimate(config: TrainConfig, device: Device, graphed: bool) -> Estimate:
    c, e, rows = config.model, sizes.element(config), rows_of(config)
    length, segments = piece_of(config), segments_of(config)
    segment = min(config.trainer.segment_length or length, length)
    count, (of_parameters, of_gradients, of_optimizer) = sizes.parameters(c), shares(config)
    fused = sizes.fused(config, device.on_gpu)
    per_token = sizes.saved_per_token(c, e, device.on_gpu, fused) + sizes.workspace_per_token(c, e, fused)
    states = sizes.state_bytes(c, e)
    activations = rows * segment * per_token
    if device.on_gpu:
        of_scan = 2 * e * rows * segment / sizes.STATE_CHUNK * c.n_heads * c.headdim * c.d_state
        slab = min(of_scan, max(SLAB_BYTES, of_scan / 16))
        of_borders = 4 * rows * c.n_heads * c.headdim * c.d_state  # between slabs, fp32, kept in every layer
        activations += slab + c.n_layers * of_borders * -(-of_scan // slab)
    passes = 4 - 1 / segments  # forward, backward as two, and once more forward but for the last segment
    tokens = config.data.batch_size * config.data.train_length
    speed = config.trainer.ranks * device.flops * device.efficiency
    launches = config.trainer.accumulate * segments * passes / 3 if device.on_gpu else 0.0
    return Estimate(
        parameters=4 * count // of_parameters,
        gradients=4 * count // of_gradients,
        optimizer=0 if config.deepspeed.offload_optimizer else 8 * count // of_optimizer,
        cast_weights=2 * sizes.matrix_parameters(c) if e == 2 else 0,
        borders=rows * states * (segments if segments > 1 else 1),
        activations=round(activations),
        graphs=_kept_by_graphs(config, activations) if graphed else 0,
        tokens=rows * length * 36,
        device_seconds=passes * sizes.flops_per_token(c) * tokens / speed,
        host_seconds=launches * c.n_layers * HOST_SECONDS,
        graphed=graphed,
        tokens_per_step=tokens,
    )


def _kept_by_graphs(config: TrainConfig, activations: float) -> int:
    """Bytes that a step needs more: gradients of a graph are copied out of it, and while one keeps the memory
    of its activations, all else has its own: the eager passes before a second kind of micro-batch is captured
    (longer rows after a curriculum's, the first with a state), else validation, some two layers of it."""
    starts_at_zero = config.initial_state.name in ("passed", "fitted_noise")  # in the first step
    kinds = 2 if starts_at_zero or config.data.curriculum_steps else 1
    outside = activations * (1 if kinds > 1 else min(1, 2 / config.model.n_layers))
    gradients = kinds + (config.trainer.accumulate > 1)
    return round(outside + 4 * sizes.parameters(config.model) * gradients)


def fits(result: Estimate, device: Device) -> bool:
    return result.peak <= USABLE * device.memory


def with_segments(config: TrainConfig, length: int | None) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, segment_length=length))


def _sharded(config: TrainConfig, stage: int) -> TrainConfig:
    trainer = replace(config.trainer, strategy="deepspeed")
    return replace(config, trainer=trainer, deepspeed=replace(config.deepspeed, stage=stage))


def longest_segment(config: TrainConfig, device: Device) -> int | None:
    """The longest segment that fits, a power of two, the whole row if it can be; None if none does."""
    length = piece_of(config)
    if fits(estimate(with_segments(config, None), device), device):
        return length
    segment = 1 << (length - 1).bit_length() - 1
    while segment >= SHORTEST_SEGMENT:
        if fits(estimate(with_segments(config, segment), device), device):
            return segment
        segment //= 2
    return None


def advice(config: TrainConfig, device: Device) -> list[str]:
    """Settings to change, each with its reason; none where all is well."""
    now, lines = estimate(config, device), []
    longest = longest_segment(config, device)
    length = piece_of(config)
    segment = config.trainer.segment_length or length
    rows = rows_of(config)
    if longest is None:
        held = now.parameters + now.gradients + now.optimizer
        if held > USABLE * device.memory:
            least = -(-held // int(USABLE * device.memory))
            taken = f"parameters, gradients and optimizer alone take {held / GIB:.1f} GiB"
            stage = next((s for s in (1, 2, 3) if fits(estimate(_sharded(config, s), device), device)), None)
            if config.trainer.ranks > 1 and stage is not None and config.trainer.strategy != "deepspeed":
                lines.append(
                    f"trainer.strategy=deepspeed deepspeed.stage={stage}: {taken}, which ZeRO shards"
                )
            else:
                lines.append(f"{taken}: shard them (ZeRO) over {least} devices or more")
        elif rows > 1:
            lines.append(f"trainer.accumulate={config.trainer.accumulate * rows}: one row at a time")
    elif not fits(now, device):
        if now.graphed and fits(_estimate(config, device, graphed=False), device):
            lines.append("trainer.cuda_graphs=false: graphs keep their memory from everything else")
        small = estimate(with_segments(config, longest), device)
        gain = f"peak {small.peak / GIB:.1f} GiB, exact gradients, recomputed once"
        lines.append(f"trainer.segment_length={longest}: {gain}")
    elif longest > segment:
        words = "trainer.segment_length=null" if longest == length else f"trainer.segment_length={longest}"
        lines.append(f"{words}: fits as well, and recomputes less")
    return lines
