"""A diagnosis as one HTML file: the verdict first, heads on demand, nothing loaded from anywhere."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.diagnosis.findings import head_name
from lightning_modules.diagnosis.reading import Measures
from lightning_modules.diagnosis.sparkline import sparkline

FIRST_FIGURES = 2  # shown at once; the others unfold
HEAD_FIELDS = (
    *("variance_ratio", "rms_inside", "rms_beyond", "top_share", "retention", "half_life", "dt", "insertion"),
)

CAPTIONS = {
    "needles.png": "Prompts of growing length whose last tokens are the same. Where the first curve falls, "
    "what stands near is lost because of what came before: collapse. Where only the second falls, what "
    "stands far is forgotten.",
    "variance.png": "Each line is a head. A head above the dotted line is outside the range of states that "
    "training has shown it.",
    "retention.png": "How much of the first token's contribution is left, by head. A head that stays near 1 "
    "past the training length never learnt to forget: everything it reads adds up.",
    "loss_by_position.png": "Loss of the prompt by position. A language model collapses where it exceeds the "
    "dotted line. A passkey model reads filler here and more and more expects the question: of that nothing "
    "is concluded.",
    "rms.png": "Size of the state by head.",
    "half_lives.png": "Tokens until half of a token's contribution is gone, by layer; each point is a head.",
    "variance_by_layer_and_head.png": "The largest state variance beyond the training length over the "
    "largest within it. Yellow heads grow.",
    "updates.png": "What drives the heads named above: the time step, how much a token makes them forget, "
    "and how much a token adds.",
    "channels.png": "Deviation of the single channels (p, n) of the head that grows most. A tail that "
    "stretches out to the right is a few outlier channels; a shift of the whole is all of them.",
    "remembrance.png": "How far the next token's distribution moves when the first tokens are left out. A "
    "curve that is high at the left still hangs on the beginning; a healthy one rises only at the right.",
}

WORDS = (
    ("unsolved", "the model does not know its task at its own training length; nothing beyond it is judged"),
    ("collapse", "what is near is lost because of what is far"),
    ("forgetting", "what is far is lost where what is near is found: a limit of capacity, not collapse"),
)


def page(diagnosis: dict[str, Any], measures: Measures, figures: list[Path]) -> str:
    """The whole document. figures: PNG files, the most telling first."""
    verdict, *findings = diagnosis["findings"]
    shown, folded = figures[:FIRST_FIGURES], figures[FIRST_FIGURES:]
    parts = [
        f"<h1>Diagnosis of {escape(diagnosis['checkpoint'])}</h1>",
        f'<p class="what">{escape(_what(diagnosis))}</p>',
        f'<p class="verdict {_kind(diagnosis)}">{escape(verdict)}</p>',
        _tiles(diagnosis),
        _list(findings),
        *map(_figure, shown),
        "<h2>More figures</h2>",
        _folded(f"{len(folded)} further figures", "".join(map(_figure, folded))),
        "<h2>Heads</h2>",
        _remarkable(diagnosis),
        *_layers(diagnosis, measures),
        "<h2>What to run next</h2>",
        _commands(next_commands(diagnosis)),
        "<h2>How this was measured</h2>",
        f"<p>{escape(_how(diagnosis, measures))}</p>",
        _commands([("the same again", diagnosis["command"])]),
        _folded("Thresholds", _thresholds(diagnosis["thresholds"])),
        _folded("Words", "".join(f"<p><b>{word}</b>: {escape(text)}.</p>" for word, text in WORDS)),
    ]
    title = escape(f"Diagnosis of {diagnosis['checkpoint']}")
    style = Path(__file__).with_name("page.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def next_commands(diagnosis: dict[str, Any]) -> list[tuple[str, str]]:
    """(what for, command) of what a reader will want next."""
    checkpoint, length, train_length = (diagnosis[name] for name in ("checkpoint", "length", "train_length"))
    diagnose = f"python -m lightning_modules.diagnose checkpoint={checkpoint}"
    commands = []
    if diagnosis["collapse"]["position"] and diagnosis["mitigation"]["name"] == "none":
        # forgets over two training lengths, what mended most models (docs/recipe.md)
        mend = f"mitigation.name=forget_more mitigation.alpha_scale={1 - 0.5 / train_length:.4g}"
        commands.append(("does forgetting mend it", f"{diagnose} length={length} {mend}"))
    if not diagnosis["collapse"]["position"] and diagnosis["collapse"]["solved"] is not False:
        commands.append(("look further", f"{diagnose} length={4 * length}"))
    other = "random" if diagnosis["prompt"]["name"] == "newline" else "newline"
    commands.append(("does it depend on the prompt", f"{diagnose} length={length} prompt={other}"))
    evaluate = f"python -m lightning_modules.evaluate checkpoint={checkpoint}"
    commands.append(("accuracy and loss by length", evaluate))
    return commands


def _kind(diagnosis: dict[str, Any]) -> str:
    """The verdict's colour."""
    collapse, solved = diagnosis["collapse"], diagnosis["thresholds"]["solved"]
    if collapse["solved"] is False:
        return "unsolved"
    if collapse["position"] is not None:
        return "bad"
    return "fair" if collapse.get("exact_furthest", 1.0) < solved else "good"


def _what(diagnosis: dict[str, Any]) -> str:
    model, prompt, task = diagnosis["model"], diagnosis["prompt"], diagnosis["task"]
    trained_on = "documents" if task == "documents" else f"{task} prompts"
    layers = "1 layer" if model["n_layers"] == 1 else f"{model['n_layers']} layers"
    return (
        f"Mamba-2 of {model['parameters']:,} parameters, {layers} of {model['n_heads']} heads, "
        f"d_state {model['d_state']}, trained on {trained_on} of {diagnosis['train_length']:,} tokens. "
        f"Read: {prompt['rows']} x {diagnosis['length']:,} tokens of {prompt['text']}, "
        f"{diagnosis['mitigation_in_words'] or 'no mitigation'}."
    )


def _how(diagnosis: dict[str, Any], measures: Measures) -> str:
    (fine, coarse), rows = diagnosis["strides"], diagnosis["prompt"]["rows"]
    return (
        f"States were measured every {fine:,} tokens within the training length and every {coarse:,} beyond, "
        f"{len(measures.positions)} times, as means over {rows} prompts. In between, dt and insertions were "
        "averaged, and log decays summed for the retention of the first token. The state was carried from "
        "segment to segment, so memory does not grow with length. Layers and heads count from 0. "
        "diagnosis.json holds the numbers, measures.npz the curves of every head."
    )


def _tiles(diagnosis: dict[str, Any]) -> str:
    collapse, total = diagnosis["collapse"], len(diagnosis["heads"])
    if collapse["solved"] is False:
        position = "unsolved"
    else:
        position = f"{collapse['position']:,}" if collapse["position"] else f"none to {collapse['to']:,}"
    tiles = [(position, "collapse, tokens")]
    for name in ("collapsed_heads", "over_retaining_heads", "outlier_channels"):
        label = {"outlier_channels": "heads with outlier channels"}.get(name, name.replace("_", " "))
        tiles.append(
            (f"{len(diagnosis[name])} of {total}", label.replace("over retaining", "over-retaining"))
        )
    cells = "".join(f"<div><b>{escape(value)}</b><span>{label}</span></div>" for value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _remarkable(diagnosis: dict[str, Any]) -> str:
    """The heads that a list names, with what named them."""
    tables = []
    columns = {
        "collapsed_heads": ("variance_inside", "variance_beyond", "variance_ratio", "exceeds"),
        "over_retaining_heads": ("retention", "half_life"),
        "outlier_channels": ("top_share", "channels"),
    }
    for name, fields in columns.items():
        rows = diagnosis[name]
        if rows:
            cells = [[head_name(row), *(_cell(field, row[field]) for field in fields)] for row in rows]
            title = f"{name.replace('_', ' ').capitalize()} ({len(rows)})".replace("Over ret", "Over-ret")
            tables.append(_folded(title, _table(["", *map(_heading, fields)], cells)))
    return "".join(tables)


def _layers(diagnosis: dict[str, Any], measures: Measures) -> Iterable[str]:
    """Every head's numbers and curves, a layer at a time."""
    values, mark = measures.values, measures.train_length
    for layer in range(diagnosis["model"]["n_layers"]):
        rows = []
        for row in (row for row in diagnosis["heads"] if row["layer"] == layer):
            head = row["head"]
            rms = sparkline(measures.positions, values["rms"][:, layer, head], mark)
            retention = np.exp(values["log_retention"][:, layer, head])
            kept = sparkline(measures.positions, retention, mark, log=False)
            rows.append([str(head), rms, kept, *(_cell(field, row[field]) for field in HEAD_FIELDS)])
        headings = ["head", "RMS by position", "retention", *map(_heading, HEAD_FIELDS)]
        worst = max((row["variance_ratio"] or 0.0) for row in diagnosis["heads"] if row["layer"] == layer)
        yield _folded(f"Layer {layer}: variance grows to {worst:.3g}x at most", _table(headings, rows))


def _heading(field: str) -> str:
    return field.replace("_", " ").replace("rms", "RMS")


def _cell(field: str, value: Any) -> str:
    if field == "half_life":
        return "never" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    if field == "channels":
        return ", ".join(f"({p}, {n}) {share:.0%}" for p, n, share in value)
    if field == "retention":
        return f"{value:.4f}"
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _thresholds(thresholds: dict[str, float]) -> str:
    rows = [[f"thresholds.{name}", f"{value:g}"] for name, value in thresholds.items()]
    return _table(["setting", "value"], rows)


def _commands(commands: list[tuple[str, str]]) -> str:
    return "".join(f"<p>{escape(why)}:</p><pre>{escape(line)}</pre>" for why, line in commands)


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = CAPTIONS[path.name]
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _list(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
