"""Measure a checkpoint far beyond its training length, in memory that does not grow with length.

    python -m lightning_modules.evaluate checkpoint=PATH [key=value ...]

PATH is a run directory, a .ckpt file, or a directory written by save_model. Examples:

    python -m lightning_modules.evaluate checkpoint=runs/demo
    python -m lightning_modules.evaluate checkpoint=runs/demo passkey.lengths=[1048576] passkey.prompts=4
    python -m lightning_modules.evaluate checkpoint=runs/demo \\
        mitigation.name=forget_more mitigation.alpha_scale=0.999

    python -m lightning_modules.evaluate checkpoint=runs/demo mitigation.name=all

The last compares: the baseline and every mitigation on the same prompts and lengths, at settings that follow
from the training length and from calibrations (made where they are missing), or at those of bench=...:

    python -m lightning_modules.evaluate checkpoint=runs/demo mitigation.name=all \\
        bench.sliding_window.window=[256,1024] bench.state_norm=null

It leaves bench.json, figures/bench.png and an evaluation a mitigation; the same command goes on after a kill.

Tasks that need no download, and a user's own text (docs/suites.md says what each is):

    python -m lightning_modules.evaluate checkpoint=runs/demo suites=[niah_single_1,mqar] \\
        tasks.settings.pairs=64
    python -m lightning_modules.evaluate checkpoint=runs/demo suites=[perplexity,niah_essay] \\
        text.source=my_books

Writes run_dir (default: a new directory under runs/): config.yaml, evaluation.json, result.json and
figures/, and records an MLflow run. The conclusion keeps three things apart: a model that is unsolved at its
own training length, collapse (recent needles lost beyond it), and forgetting (far needles lost where recent
ones are found).
"""

from conf.load import from_command_line, user_errors
from conf.measure_schema import EvaluateConfig
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(EvaluateConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        # Imports torch: only for a config that holds.
        from lightning_modules.evaluation.bench import bench
        from lightning_modules.evaluation.run import evaluate

        bench(config) if config.mitigation.name == "all" else evaluate(config)


if __name__ == "__main__":
    main()
