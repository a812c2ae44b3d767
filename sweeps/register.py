"""python -m sweeps.register study=DIR name=NAME [stage=train|confirm] [trial=N] [layout=hf]

Register the best model of a sweep in MLflow: its files, as `lightning_modules.convert` writes them, go to
the artifacts of the run that trained it; NAME gets a version with the model card as its description, and the
alias `best`. What is registered already gets no second version.

    python -m sweeps.register study=runs/demo name=demo
    python -m sweeps.register study=runs/demo name=demo stage=confirm    # the best under its mitigation

Load it with mlflow.artifacts.download_artifacts("models:/NAME@best"), MLFLOW_TRACKING_URI being the study's
tracking.uri, and transformers.AutoModelForCausalLM.from_pretrained on the folder that returns.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.load import from_command_line, user_errors
from conf.sweep_schema import RegisterConfig, SweepConfig
from conf.sweep_stages import objectives_of

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

    from sweeps.reports.results import Measured, Results

ALIAS = "best"
FOLDER = "model"  # in the run's artifacts


def main(argv: list[str] | None = None) -> int:
    args = from_command_line(RegisterConfig, __doc__ or "", argv)
    with user_errors():
        register(args)
    return 0


@dataclass(frozen=True)
class Choice:
    """A trained model and where its evaluation lies; mitigation: in words, where one belongs to it."""

    model: "Measured"
    evaluation: Path
    value: float
    mitigation: str = ""

    @property
    def checkpoint(self) -> Path:
        return Path(self.model.point.get("checkpoint", self.model.run_dir))


def register(args: RegisterConfig) -> str:
    """Returns the version. Raises ValueError (one line) where there is no such model or no such run."""
    from conf.conversion import ConvertConfig
    from lightning_modules.conversion.run import convert
    from lightning_modules.mlflow_store import connect
    from lightning_modules.run_dir import read_result
    from sweeps.reports.results import collect
    from sweeps.stores.studies import load_studies
    from sweeps.stores.study_dir import load

    study_dir = Path(args.study)
    config = load(study_dir)
    choice = choose(collect(study_dir, config, load_studies(study_dir)), args, config)
    run_id = (
        (read_result(choice.checkpoint) or {}).get("mlflow_run_id") if choice.checkpoint.is_dir() else None
    )
    if run_id is None:
        raise ValueError(
            f"study={study_dir}: {choice.checkpoint} was trained with tracking.enabled=false: it has no "
            "MLflow run to belong to"
        )
    client = connect(config.tracking.uri)
    with tempfile.TemporaryDirectory(prefix="register-", dir=study_dir) as folder:
        target = Path(folder) / "model"
        report = convert(
            ConvertConfig(
                source=str(choice.checkpoint),
                target=str(target),
                layout=args.layout,
                max_shard_size=args.max_shard_size,
                evaluation=str(choice.evaluation) if args.layout == "hf" else None,
            )
        )
        tags = {
            "study": config.name,
            "stage": args.stage,
            "trial": f"{choice.model.number:04d}",
            "objective": f"{choice.value:.6g}",
            "layout": args.layout,
            "sha256": report["sha256"],
        } | ({"mitigation": choice.mitigation} if choice.mitigation else {})
        version = _register(client, args.name, run_id, target, tags)
    print(f"{args.name} version {version} ({choice.model.label}): models:/{args.name}@{ALIAS}")
    return version


def choose(results: "Results", args: RegisterConfig, config: SweepConfig) -> Choice:
    """The best finished model of a stage, or the trial asked for. Raises ValueError where there is none."""
    from sweeps.reports.results import describe, mitigation

    models = [m for m in results.models if args.trial in (None, m.number)]
    if not models:
        which = "no finished model" if args.trial is None else f"no finished training trial {args.trial}"
        raise ValueError(f"study={args.study}: has {which} to register")
    if args.stage == "train":
        if args.trial is None:
            models = [m for m in models if not m.broken] or models
        sign = 1 if next(iter(objectives_of(config.train).values())) == "maximize" else -1
        best = max(models, key=lambda m: (sign * m.value, m.held, -m.number))
        return Choice(best, best.run_dir / "evaluation", best.value)
    sign = 1 if config.mitigation.direction == "maximize" else -1
    numbers = {m.number for m in models}
    compared = [
        (mended.model, m)
        for mended in results.mended
        if mended.model.number in numbers
        for m in mended.compared
    ]
    if not compared:
        raise ValueError(f"study={args.study}: no mitigation was compared (stage=confirm); use stage=train")
    model, best = max(compared, key=lambda pair: (sign * pair[1].value, pair[1].held))
    words = "" if mitigation(best) == "none" else describe(best.point)
    return Choice(model, best.run_dir, best.value, words)


def _register(client: "MlflowClient", name: str, run_id: str, folder: Path, tags: dict[str, str]) -> str:
    """A version of the registered model with these files; the one that is there if it holds the same."""
    from mlflow.exceptions import MlflowException

    from lightning_modules.mlflow_store import one_line

    try:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        for version in client.search_model_versions(f"name = '{name}'"):
            if tags.items() <= version.tags.items():
                print(f"{name}: holds this very model already")
                break
        else:
            place = f"{FOLDER}-{tags['sha256'][:8]}"
            client.log_artifacts(run_id, str(folder), place)
            card = folder / "README.md"
            version = client.create_model_version(
                name,
                source=f"{client.get_run(run_id).info.artifact_uri}/{place}",
                run_id=run_id,
                tags=tags,
                description=card.read_text().split("---\n", 2)[2].strip() if card.is_file() else None,
            )
        client.set_registered_model_alias(name, ALIAS, version.version)
    except MlflowException as error:
        raise ValueError(f"name={name}: MLflow refuses it ({one_line(error)})") from None
    return str(version.version)


if __name__ == "__main__":
    sys.exit(main())
