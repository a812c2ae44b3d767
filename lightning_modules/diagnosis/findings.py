"""A diagnosis in sentences, from diagnosis.json alone."""

from typing import Any

Row = dict[str, Any]


def findings(diagnosis: dict[str, Any]) -> list[str]:
    """The diagnosis in sentences, the verdict first."""
    said = [_say_collapse(diagnosis)]
    if diagnosis["non_finite"] is not None:
        where = diagnosis["non_finite"]
        said.append(
            f"States stop being finite: layer {where['layer']}, head {where['head']} at token "
            f"{where['position']:,}. Reading ended there."
        )
    return [*said, *_say_needles(diagnosis), *_say_heads(diagnosis), *_say_remembrance(diagnosis)]


def _say_collapse(diagnosis: dict[str, Any]) -> str:
    collapse, train_length = diagnosis["collapse"], diagnosis["train_length"]
    thresholds = diagnosis["thresholds"]
    if collapse["by"] == "loss":
        inside = f"loss {collapse['loss_inside']:.3g} nats a token inside"
        if collapse["solved"] is False:
            return (
                f"Unsolved at its own length of {train_length:,} tokens: {inside}, a uniform guess has "
                f"{collapse['loss_of_chance']:.3g}. Collapse cannot be judged."
            )
        if collapse["position"] is None:
            return (
                f"No collapse to {collapse['to']:,} tokens: beyond the training length of {train_length:,} "
                f"the loss reaches {_ratio(collapse['loss_ratio'])} its maximum inside; "
                f"collapse begins above {thresholds['loss_ratio']:g}x."
            )
        level = "not finite" if collapse["loss"] is None else f"{collapse['loss']:.3g} nats a token"
        return (
            f"Collapse at token {collapse['position']:,}, {_times(collapse['position'], train_length)} the "
            f"training length: loss {level}, above {thresholds['loss_ratio']:g}x its maximum inside, "
            f"{collapse['loss_inside_max']:.3g}."
        )
    if not collapse["solved"]:
        return (
            f"Unsolved at its own length of {train_length:,} tokens: exact match "
            f"{collapse['exact_inside']:.2f}, below {thresholds['solved']:g}. Collapse cannot be judged."
        )
    if collapse["position"] is None:
        return (
            f"No collapse to {collapse['to']:,} tokens: needles within the last {train_length:,} tokens are "
            f"found there with exact match {collapse['exact_furthest']:.2f} (at the training length "
            f"{collapse['exact_inside']:.2f}; lost at {thresholds['lost']:g})."
        )
    return (
        f"Collapse between {collapse['held_to']:,} and {collapse['position']:,} tokens, "
        f"{_times(collapse['position'], train_length)} the training length: needles within the last "
        f"{train_length:,} tokens are found with exact match {collapse['exact']:.2f} "
        f"({collapse['exact_inside']:.2f} at the training length)."
    )


def _say_needles(diagnosis: dict[str, Any]) -> list[str]:
    collapse = diagnosis["collapse"]
    if collapse["by"] == "loss" or not collapse["solved"]:
        return []
    said = []
    if collapse["answer_loss_rises"] is not None:
        said.append(
            f"The answer's loss exceeds {diagnosis['thresholds']['loss_ratio']:g}x its value at the training "
            f"length, {collapse['answer_loss_inside']:.2g} nats a digit, from "
            f"{collapse['answer_loss_rises']:,} tokens on."
        )
    if collapse["forgetting_position"] is not None:
        said.append(
            f"Forgetting: at {collapse['forgetting_position']:,} tokens needles anywhere in the prompt are "
            "lost and recent ones found. That is a limit of capacity, not collapse."
        )
    return said


def _say_heads(diagnosis: dict[str, Any]) -> list[str]:
    thresholds, total = diagnosis["thresholds"], len(diagnosis["heads"])
    train_length, said = diagnosis["train_length"], []

    def named(rows: list[Row], detail: str) -> str:
        shown = [f"{head_name(row)} ({detail.format(**row)})" for row in rows[:4]]
        more = f", and {len(rows) - 4} more" if len(rows) > 4 else ""
        return f"{len(rows)} of {total}: {', '.join(shown)}{more}."

    limit = f"{thresholds['variance_ratio']:g}x its maximum within the training length"
    if rows := diagnosis["collapsed_heads"]:
        said.append(f"Heads whose state variance exceeds {limit}: {named(rows, '{variance_ratio:.3g}x')}")
        if diagnosis["collapse"]["solved"] and diagnosis["collapse_position"] is None:
            said[-1] += " The model bears it so far."
    else:
        ratios = [row["variance_ratio"] or 0.0 for row in diagnosis["heads"]]
        said.append(f"No head's state variance exceeds {limit}; the largest reaches {max(ratios):.3g}x.")
    kept = f"{thresholds['retention']:g} of the first token over {train_length:,} tokens"
    if rows := diagnosis["over_retaining_heads"]:
        said.append(f"Heads that keep more than {kept}: {named(rows, '{retention:.4f}')}")
    else:
        most = max(diagnosis["heads"], key=lambda row: row["retention"])
        said.append(f"No head keeps more than {kept}; {head_name(most)} keeps {most['retention']:.3g}.")
    if rows := diagnosis["outlier_channels"]:
        top, share = thresholds["top_channels"], thresholds["channel_share"]
        said.append(
            f"Heads whose top {top:.0%} of channels hold more than {share:.0%} of the state's variance: "
            f"{named(rows, '{top_share:.0%}')}"
        )
    return said


def _say_remembrance(diagnosis: dict[str, Any]) -> list[str]:
    found = diagnosis["remembrance"]
    if found is None:
        return []
    quarter = round(found["length"] / 4)
    i = min(range(len(found["start"])), key=lambda i: abs(found["start"][i] - quarter))
    return [
        f"Without the first {found['start'][i]:,} of {found['length']:,} tokens the distribution of the next "
        f"token moves by {found['distance'][i]:.2g} (total variation, 0 to 1)."
    ]


def head_name(row: Row) -> str:
    return f"layer {row['layer']} head {row['head']}"


def _times(position: int, train_length: int) -> str:
    return f"{position / train_length:.3g}x"


def _ratio(value: float | None) -> str:
    return "infinitely many times" if value is None else f"{value:.3g}x"
