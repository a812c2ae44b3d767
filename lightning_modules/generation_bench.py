"""Speed of generation behind prompts of different lengths: a state of fixed size makes it one number.

    python -m lightning_modules.generation_bench [checkpoint=PATH] [key=value ...]

PATH may be a guest of another family too (docs/from-a-checkpoint.md), read as `evaluate` reads it: no CUDA
graph, fp32; where layers of attention make its state grow, that is told.

Reads random tokens up to each of `positions`, then makes tokens behind each in turn. The table's ratio is the
median over rounds of the speed against that behind the first position. Examples:

    python -m lightning_modules.generation_bench
    python -m lightning_modules.generation_bench checkpoint=runs/demo positions=[1024,65536,1048576] threads=1
    python -m lightning_modules.generation_bench model.d_model=2048 model.n_layers=48 model.headdim=64 \\
        model.d_state=128 dtype=bfloat16 batch_size=16 output=generation.json
"""

from conf.generate_schema import GenerationBenchConfig
from conf.load import from_command_line, user_errors
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(GenerationBenchConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        from lightning_modules.generation.bench import bench  # imports torch: only for a config that holds

        bench(config)


if __name__ == "__main__":
    main()
