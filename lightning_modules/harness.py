"""Ask a checkpoint the tasks of lm-evaluation-harness, at any length: nothing is ever truncated.

    python -m lightning_modules.harness checkpoint=PATH tasks=[lambada_openai,piqa] [key=value ...]

Needs the optional extra: .venv/bin/pip install -c constraints.txt -e '.[lm-eval]'. Examples:

    python -m lightning_modules.harness checkpoint=runs/demo tasks=[lambada_openai] limit=100
    python -m lightning_modules.harness checkpoint=runs/demo tasks=[mine] include_path=my_tasks \\
        mitigation.name=forget_more mitigation.alpha_scale=0.999

Contexts are read in segments of `segment` tokens with the state carried, so memory is flat in length; a
context that several answers share is read once. A request above `max_length`, if one is given, is an error.
Writes run_dir (default: a new directory under runs/): harness.json, scores.jsonl (every question's
scores and tokens), result.json, config.yaml; records an MLflow run.
"""

from importlib.util import find_spec

from conf.harness_schema import HarnessConfig
from conf.load import from_command_line, user_errors
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(HarnessConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        if find_spec("lm_eval") is None:
            install = ".venv/bin/pip install -c constraints.txt -e '.[lm-eval]'"
            raise ValueError(f"tasks={config.tasks}: lm-evaluation-harness is not installed: {install}")
        # Imports torch: only for a config that holds.
        from lightning_modules.lm_harness.run import run_harness

        run_harness(config)


if __name__ == "__main__":
    main()
