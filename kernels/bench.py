"""Our kernels against peers and against what the machine allows.

    python -m kernels.bench suite=model [key=value ...]   a small model's training step, on the CPU
    python -m kernels.bench suite=ops [key=value ...]     every operator, on a GPU
    python -m kernels.bench suite=training [...]          a large model's step at several lengths, on a GPU

Without `suite`: ops where CUDA is there, model elsewhere. `suite=... --help` lists the settings of each.
"""

import importlib
import sys

from conf.load import die, from_command_line

SUITES = {
    "model": "kernels.benchmarks.model",
    "ops": "kernels.benchmarks.operators",
    "training": "kernels.benchmarks.training",
}


def suite_of(argv: list[str]) -> str:
    """The suite that is asked for, or the one that fits this machine."""
    asked = [argument.removeprefix("suite=") for argument in argv if argument.startswith("suite=")]
    if asked:
        if asked[-1] not in SUITES:
            die(f"suite={asked[-1]}: choose from [{', '.join(SUITES)}]")
        return asked[-1]
    import torch

    return "ops" if torch.cuda.is_available() else "model"


def main() -> None:
    argv = sys.argv[1:]
    suite = importlib.import_module(SUITES[suite_of(argv)])
    config = from_command_line(suite.BenchConfig, f"{__doc__}\n{suite.__doc__}", argv)
    suite.run(config)


if __name__ == "__main__":
    main()
