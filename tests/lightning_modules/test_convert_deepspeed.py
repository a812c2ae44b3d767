"""What DeepSpeed itself saves and consolidates converts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.conversion import ConvertConfig
from lightning_modules.checkpoints import load_model
from lightning_modules.conversion.run import convert

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch, deepspeed
from pathlib import Path
from conf.schema import ModelConfig, TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.checkpoints import save_model
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
folder = Path(sys.argv[1])
config = TrainConfig(model=ModelConfig(d_model=32, headdim=8))

class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Mamba2LM(config.model)
    def forward(self, ids):
        return self.model(ids).logits.logsumexp(-1).mean()

wrapper = Wrapper()
zero = {"stage": 2, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000, "overlap_comm": False}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
optimizer = torch.optim.AdamW(wrapper.parameters())
engine, *_ = deepspeed.initialize(model=wrapper, optimizer=optimizer, config=settings)
engine.backward(engine(torch.randint(256, (1, 20))))
engine.step()
engine.save_checkpoint(str(folder / "checkpoints" / "raw"))
save_model(wrapper.model, folder / "expected", config)
(folder / "config.yaml").write_text((folder / "expected" / "config.yaml").read_text())
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as consolidate
consolidate(str(folder / "checkpoints" / "raw"), str(folder / "checkpoints" / "whole"), max_shard_size="60KB")
"""


@pytest.mark.slow
def test_a_zero_checkpoint_consolidated_by_deepspeed(tmp_path: Path) -> None:
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(
        line, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    source, target = tmp_path / "checkpoints", tmp_path / "hf"
    assert len(list((source / "whole").glob("*.bin"))) > 1
    convert(ConvertConfig(source=str(source / "whole"), target=str(target), layout="hf"))
    expected = load_model(tmp_path / "expected").state_dict()
    for name, value in load_model(target).state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(ValueError, match="shards of DeepSpeed"):
        convert(ConvertConfig(source=str(source / "raw"), target=str(tmp_path / "never")))
