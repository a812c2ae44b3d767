"""README.md of an exported model: what it is and what its run measured, from the run's own files alone.

result.json and config.yaml of the training; evaluation.json and diagnosis.json as given, else the newest of
this checkpoint inside the run directory or in a directory beside it. What no file tells is said to be not
measured.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.capacity import state_elements
from conf.conversion import ConvertConfig
from conf.schema import TrainConfig
from lightning_modules.conversion.parameters import Parameters
from lightning_modules.evaluation.report import describe_mitigation

UNKNOWN = "not measured"
FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mamba2, recurrent, longstate]
---
"""


def write_card(
    config: ConvertConfig, source: Path, parameters: Parameters, report: dict[str, Any], folder: Path
) -> None:
    """Raises ValueError (one line) where a file that was named cannot be read."""
    run = _run_of(source)
    files = {
        kind: _given(getattr(config, kind), kind) or _newest(run, kind)
        for kind in ("evaluation", "diagnosis")
    }
    trained = _read(run / "result.json") if (run / "result.json").is_file() else {}
    (folder / "README.md").write_text(
        card(run.resolve().name, parameters, report, trained, *(_read(file) for file in files.values()))
    )


def card(
    name: str,
    parameters: Parameters,
    report: dict[str, Any],
    trained: dict[str, Any],
    evaluation: dict[str, Any],
    diagnosis: dict[str, Any],
) -> str:
    """The text; an empty dictionary for what was not measured."""
    model = parameters.config
    ssm, conv = state_elements(model)
    lines = [
        FRONT,
        f"# {name}",
        "",
        f"A Mamba-2 language model of {report['parameters']:,} parameters: {model.n_layers} layers of width "
        f"{model.d_model}, {model.n_heads} heads of {model.headdim} channels, {model.vocab_size} token ids. "
        f"Converted from the {report['source_layout']} layout; weights in {', '.join(report['dtypes'])}.",
        "",
        "## Load it",
        "",
        *_usage(report),
        "",
        "## Training lengths",
        "",
        *_training(parameters.trained, trained),
        "",
        "## State size",
        "",
        f"N_S = {ssm + conv:,} numbers a sequence, whatever its length: {ssm:,} in SSM states "
        f"({model.n_layers} layers x {model.n_heads} heads x {model.headdim} x {model.d_state}), {conv:,} in "
        "the convolutions' last inputs.",
        "",
        "## Collapse position",
        "",
        *_collapse(evaluation, diagnosis),
        "",
        "## Passkey",
        "",
        *_passkey(evaluation),
        "",
        "## The same model",
        "",
        *_parity(report),
    ]
    return "\n".join(lines) + "\n"


def _usage(report: dict[str, Any]) -> Iterator[str]:
    yield "```python"
    has_tokenizer = report["tokenizer"] != "none known"
    yield f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}"
    yield ""
    yield 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
    if has_tokenizer:
        yield 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    yield "```"


def _training(config: TrainConfig | None, result: dict[str, Any]) -> Iterator[str]:
    if config is None:
        yield "Unknown: the source held no training config."
        return
    data, steps = config.data, config.trainer.max_steps
    at_length = steps - data.curriculum_steps
    if data.curriculum_steps:
        yield f"- {data.curriculum_steps:,} steps at {data.curriculum_length:,} tokens"
    yield f"- {at_length:,} steps at {data.train_length:,} tokens, {data.batch_size} sequences a step"
    yield f"- task: {data.name}; tokenizer: {data.tokenizer}; initial states: {config.initial_state.name}"
    if config.init_from is not None:
        yield f"- started from {config.init_from}"
    if not result:
        yield "- result of the training: not found"
    for name, value in result.get("metrics", {}).items():
        if name.startswith("val/"):
            yield f"- {name}: {value:.6g}"


def _collapse(evaluation: dict[str, Any], diagnosis: dict[str, Any]) -> Iterator[str]:
    if diagnosis:
        found, under = diagnosis["collapse"], describe_mitigation(diagnosis["mitigation"])
        said = f"By {found['by']}, read to {found['to']:,} tokens{f', under {under}' if under else ''}: "
        if found["solved"] is False:
            yield f"{said}none can be told, the task is unsolved at the training length."
        elif found["position"] is None:
            yield f"{said}no collapse."
        else:
            yield f"{said}**{found['position']:,} tokens**."
        heads = len(diagnosis["collapsed_heads"])
        yield f"Heads whose states leave their range beyond the training length: {heads}."
    elif evaluation.get("passkey"):
        found, furthest = evaluation["conclusion"], evaluation["passkey"]["recent"][-1]["length"]
        if not found["solved"]:
            yield "None can be told: the task is unsolved at the training length."
        elif found["collapse_length"] is None:
            yield f"No collapse among the lengths evaluated, to {furthest:,} tokens."
        else:
            where = f"**{found['collapse_length']:,} tokens**"
            yield f"Among the lengths evaluated, recent needles are lost from {where}."
    else:
        yield f"{UNKNOWN.capitalize()}."


def _passkey(evaluation: dict[str, Any]) -> Iterator[str]:
    passkey = evaluation.get("passkey")
    if not passkey:
        yield f"{UNKNOWN.capitalize()}."
        return
    under, window = describe_mitigation(evaluation["mitigation"]), evaluation["recent_window"]
    yield (
        f"Exact match with 95% intervals{f', under {under}' if under else ''}. Recent: the needle lies "
        f"within the last {window:,} tokens."
    )
    yield ""
    yield "| tokens | recent needles | needles at all depths |"
    yield "|---:|---|---|"
    recent, recall = ({row["length"]: row for row in passkey[key]} for key in ("recent", "recall_by_length"))
    for length in sorted(recent.keys() | recall.keys()):
        yield f"| {length:,} | {_share(recent.get(length))} | {_share(recall.get(length))} |"


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return UNKNOWN
    return f"{row['exact']:.2f} ({row['exact_low']:.2f} to {row['exact_high']:.2f}, {row['prompts']} prompts)"


def _parity(report: dict[str, Any]) -> Iterator[str]:
    yield f"SHA-256 of the weights, in the project's names: `{report['sha256']}`."
    rows, length = report["tokens"]
    if not report["comparisons"]:
        yield f"Logits: {UNKNOWN}."
    for found in report["comparisons"]:
        yield (
            f"On {rows} x {length} fixed tokens in fp32, logits of {found['first']} and of {found['second']} "
            f"differ by at most {found['max_difference']:.3g} (largest logit {found['largest_logit']:.3g})."
        )


def _run_of(source: Path) -> Path:
    """The directory whose files tell of the source: a run's, or the source's own."""
    source = source.resolve()
    folder = source if source.is_dir() else source.parent
    return folder.parent if folder.name == "checkpoints" else folder


def _given(path: str | None, kind: str) -> Path | None:
    if path is None:
        return None
    file = Path(path) / f"{kind}.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{kind}={path}: no {kind}.json there")
    return file


def _newest(run: Path, kind: str) -> Path | None:
    """Of the measurements of this run, inside it or beside it."""
    found = [
        file
        for file in (*run.glob(f"*/{kind}.json"), *run.parent.glob(f"*/{kind}.json"))
        if _is_of(run, file)
    ]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _is_of(run: Path, file: Path) -> bool:
    if file.parent.parent == run:
        return True
    try:
        checkpoint = json.loads(file.read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return Path(checkpoint).exists() and _run_of(Path(checkpoint)) == run


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
