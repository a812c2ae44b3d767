"""Settings of `trainer.strategy=deepspeed` (lightning_modules/strategies/): what each rank keeps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.fields import option, require

# Other settings of ours say these; a file of DeepSpeed's own may not contradict them.
OWNED = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size and trainer.accumulate",
    "gradient_accumulation_steps": "trainer.accumulate",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
}
OWNED_ZERO = {
    "stage": "deepspeed.stage",
    "offload_optimizer": "deepspeed.offload_optimizer",
    "offload_param": "deepspeed.offload_parameters",
}


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """What trainer.strategy=deepspeed shards among ranks (ZeRO), and what it keeps in CPU memory."""

    stage: int = option(2, "shard among ranks 1: optimizer states, 2: gradients too, 3: parameters too")
    offload_optimizer: bool = option(False, "keep optimizer states in CPU memory, and step there")
    offload_parameters: bool = option(False, "stage 3: keep the parameters' shards in CPU memory")
    config: str | None = option(None, "JSON file of DeepSpeed's further settings, e.g. bucket sizes")

    def __post_init__(self) -> None:
        require(
            1 <= self.stage <= 3, "deepspeed.stage", self.stage, "must be 1, 2 or 3; for none: strategy=ddp"
        )
        remedy = f"needs parameters in shards, deepspeed.stage=3; stage {self.stage} keeps them whole"
        sharded = self.stage == 3 or not self.offload_parameters
        require(sharded, "deepspeed.offload_parameters", self.offload_parameters, remedy)
        self.further()

    def further(self) -> dict[str, Any]:
        """What the JSON file says. Raises ValueError (one line) where it cannot be read or contradicts us."""
        if self.config is None:
            return {}
        name = "deepspeed.config"
        try:
            further = json.loads(Path(self.config).read_text())
        except OSError as error:
            raise ValueError(f"{name}={self.config}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"{name}={self.config}: not valid JSON: {error}") from None
        zero: Any = further.get("zero_optimization", {}) if isinstance(further, dict) else None
        require(isinstance(zero, dict), name, self.config, "must be an object, as DeepSpeed's settings are")
        for keys, owned in ((further, OWNED), (zero, OWNED_ZERO)):
            for key in sorted(keys & owned.keys()):
                raise ValueError(f"{name}={self.config}: sets {key}: leave that to {owned[key]}")
        return further
