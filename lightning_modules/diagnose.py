"""Find out where a checkpoint collapses, in which heads, and why.

    python -m lightning_modules.diagnose checkpoint=PATH [key=value ...]

PATH is a run directory, a .ckpt file, or a directory written by save_model. Streams a prompt of any length
through the carried state, in memory that does not grow with length, and measures every head on the way:

    python -m lightning_modules.diagnose checkpoint=runs/demo
    python -m lightning_modules.diagnose checkpoint=runs/demo length=1048576 prompt=newline
    python -m lightning_modules.diagnose checkpoint=runs/demo \\
        mitigation.name=forget_more mitigation.alpha_scale=0.998

Writes run_dir (default: a new directory under runs/): diagnosis.html to read, diagnosis.json, measures.npz,
config.yaml, result.json and figures/, and records an MLflow run. docs/collapse.md tells how to read it.
"""

from conf.load import from_command_line, user_errors
from conf.measure_schema import DiagnoseConfig
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(DiagnoseConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        from lightning_modules.diagnosis.run import diagnose  # imports torch: only for a config that holds

        diagnose(config)


if __name__ == "__main__":
    main()
