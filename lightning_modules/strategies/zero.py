"""ZeRO through DeepSpeed: each rank keeps a share of optimizer states, gradients (2) and parameters (3).

DeepSpeed's own bf16 mode casts every parameter, and the recurrence does not survive that: A_log, dt_bias and
D set time scales of thousands of tokens. So parameters stay fp32 here under either precision, as they do
without DeepSpeed, and bf16 enters as autocast within the engine: matrix products read bf16 copies, everything
that the model keeps in fp32 (states, decays, norms, the residual stream) stays so. Gradients are reduced in
fp32.

Checkpoints are those of every other strategy (zero_states.py): any of them, on any number of ranks, goes on.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from conf.schema import TrainConfig
from lightning_modules.finite import GradientWatch
from lightning_modules.gradient_norms import norms_by_group
from lightning_modules.layer import Mamba2
from lightning_modules.strategies.zero_states import ZeroStates, full_weights

CPU_BUCKET = 5_000_000  # elements; DeepSpeed allocates a bucket at once, however small the model


class ZeroPrecision(DeepSpeedPrecision):
    """fp32 to DeepSpeed; products in bf16 under trainer.precision=bf16-mixed."""

    def __init__(self, precision: str, device_type: str) -> None:
        super().__init__("32-true")
        self.autocasts, self.device_type = precision == "bf16-mixed", device_type

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, torch.bfloat16) if self.autocasts else nullcontext()

    def convert_input(self, data: Any) -> Any:
        return data  # loss weights are sums' terms: fp32

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the number of micro-batches already.
        engine: Any = model.trainer.strategy.model
        engine.backward(tensor, scale_wrt_gas=False)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Called for every micro-batch; DeepSpeed counts them."""
        closure()
        strategy = model.trainer.strategy
        is_last = strategy.model.is_gradient_accumulation_boundary()
        if is_last:
            call._call_callback_hooks(model.trainer, "on_before_optimizer_step", optimizer)
            call._call_lightning_module_hook(model.trainer, "on_before_optimizer_step", optimizer)
            strategy.note_gradient_groups()
        strategy.model.step()
        if is_last:
            strategy.note_gradients()


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, on CPUs too, with our checkpoints and our normalisation."""

    def __init__(self, config: TrainConfig, on_cpu: bool) -> None:
        self.on_cpu, self.watch = on_cpu, GradientWatch()
        self.engine: Any = None
        self.states: ZeroStates | None = None
        super().__init__(
            config=zero_config(config, on_cpu),
            precision_plugin=ZeroPrecision(config.trainer.precision, "cpu" if on_cpu else "cuda"),
            process_group_backend="gloo" if on_cpu else None,
        )
        # What a user need not know: that it begins, and that it calls a PyTorch function by its old name.
        logging.getLogger("lightning.pytorch.strategies.deepspeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated")
        if on_cpu:
            import deepspeed

            # Else it compiles an all-reduce of its own for ranks that share memory, with g++ and ninja.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # On CPUs: Lightning's own refuses any accelerator but CUDA's and compares device indices.

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device

    def setup_environment(self) -> None:
        if self.on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.on_cpu:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    # The model: built whole on every rank, as without DeepSpeed, so that weights depend on the seed alone.

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # weights are loaded before DeepSpeed shards them

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING and self.engine is not None:
            self.model = self.engine  # validation after training
            return
        assert self.lightning_module is not None
        if trainer.state.fn == TrainerFn.FITTING:
            self.watch.start(self.lightning_module.model)  # type: ignore[arg-type]
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.engine = self.model
            if self.zero_stage_3:
                _announce_borrowed_parameters(self.lightning_module)
            self.states = ZeroStates(self.engine, self.lightning_module, self.zero_stage_3)
            if self.is_global_zero:
                print(require_fp32(self.lightning_module, self.states), flush=True)
            else:
                require_fp32(self.lightning_module, self.states)

    def init_deepspeed(self) -> None:
        assert isinstance(self.model, pl.LightningModule)
        # Lightning warns that configure_gradient_clipping will not be called: it need not.
        self._initialize_deepspeed_train(self.model)

    def teardown(self) -> None:
        """The process ends, or validates with the same engine: nothing moves to the CPU."""
        assert self.accelerator is not None
        self.accelerator.teardown()

    def note_gradient_groups(self) -> None:
        """Tell the model the norms of its groups of parameters, if they are to be logged: before the step,
        which lets go of gradients."""
        module: Any = self.lightning_module
        assert self.states is not None
        if module.logs_this_step:
            module.grad_norms = norms_by_group(self.states.gradients(), self._add_up)

    def _add_up(self, values: Tensor) -> Tensor:
        return self.reduce(values.to(self.root_device), reduce_op="sum")

    def note_gradients(self) -> None:
        """Tell the model the norm of the step just taken; it raises if that is not finite."""
        engine, module = self.engine, self.lightning_module
        assert module is not None
        norm = float("inf") if engine.optimizer.overflow else float(engine.get_global_grad_norm())
        module.note_gradient_norm(norm, self.watch.first_non_finite)  # type: ignore[operator]
        self.watch.clear()

    def run_inside(self, method: str, *args: Any) -> Any:
        """Call a method of the LightningModule as if within its forward: stage 3 then gathers parameters."""
        return self._forward_redirection(self.model, self.lightning_module, method, *args)  # type: ignore[arg-type]

    # Checkpoints, as every strategy writes and reads them.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return full_weights(self.lightning_module, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.states is not None
        return self.states.gather(keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self.states is not None
        self.states.scatter(checkpoint["optimizer_states"][0])


def build_strategy(config: TrainConfig, on_cpu: bool) -> str | ZeroStrategy:
    """What pl.Trainer takes. Raises ValueError (one line) where DeepSpeed is asked for and not there."""
    if config.trainer.strategy != "deepspeed":
        return config.trainer.strategy
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"trainer.strategy=deepspeed: DeepSpeed cannot be imported ({error}): pip install deepspeed, or "
            "trainer.strategy=ddp"
        ) from None
    return ZeroStrategy(config, on_cpu)


def zero_config(config: TrainConfig, on_cpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings of this run."""
    ours, data, trainer = config.deepspeed, config.data, config.trainer
    further = ours.further()
    zero: dict[str, Any] = {"stage": ours.stage}
    if on_cpu:
        zero |= {"reduce_bucket_size": CPU_BUCKET, "allgather_bucket_size": CPU_BUCKET, "overlap_comm": False}
    zero |= further.pop("zero_optimization", {})
    offload = {"device": "cpu", "pin_memory": not on_cpu}
    if ours.offload_optimizer:
        zero["offload_optimizer"] = offload
    if ours.offload_parameters:
        zero["offload_param"] = offload
    return {
        **further,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": data.batch_size // (trainer.data_ranks * trainer.accumulate),
        "gradient_clipping": config.optim.grad_clip,
        "torch_autocast": {
            "enabled": trainer.precision == "bf16-mixed",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # would reduce these modules' gradients in bf16
        },
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # the same in CPU memory: nothing is compiled at run time
    }


def require_fp32(module: nn.Module, states: "ZeroStates") -> str:
    """A table of what is kept in which dtype. Raises RuntimeError unless it is fp32 throughout."""
    rows = states.dtypes(module)
    wrong = [f"{name} in {dtype}" for name, _, dtype in rows if dtype != torch.float32]
    if wrong:
        raise RuntimeError(f"DeepSpeed keeps {', '.join(wrong)}: these must be fp32")
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}}  {str(dtype)[6:]}  {count:>15,}" for name, count, dtype in rows]
    return "\n".join([f"DeepSpeed ZeRO-{states.stage}; kept in:", *lines])


def _announce_borrowed_parameters(model: torch.nn.Module) -> None:
    """Tell DeepSpeed which parameters a layer reads itself that are its modules': it gathers a module's for
    that module's calls, and the layer as one operator calls none but in_proj."""
    import deepspeed

    for mixer in model.modules():
        if isinstance(mixer, Mamba2):
            for module in (mixer.conv1d, mixer.norm, mixer.out_proj):
                for parameter in module.parameters(recurse=False):
                    deepspeed.zero.register_external_parameter(mixer, parameter)
