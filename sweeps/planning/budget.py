"""What a stage has spent of its budget, counted from its trials: the same for every worker and start.

Tokens and hours decide whether a trial may begin. One that has begun is finished, interruptions included, and
counts from its beginning with all the tokens it will take; hours as they pass.
"""

import time
from collections.abc import Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.sweep_schema import SweepConfig
from conf.sweep_stages import BudgetConfig


def budget_of(study: Study, config: SweepConfig) -> BudgetConfig:
    """Of a study's stage; a comparison on fresh prompts has none."""
    stages = {"train": config.train.budget, "mitigation": config.mitigation.budget}
    return stages.get(study.user_attrs["stage"], BudgetConfig())


def spent_tokens(trials: Sequence[FrozenTrial]) -> float:
    """Tokens trained, and those that begun trials will still take."""
    return sum(trial.user_attrs.get("tokens", 0.0) for trial in trials)


def spent_seconds(trials: Sequence[FrozenTrial]) -> float:
    """Seconds of work, the present work of running trials included."""
    total = 0.0
    for trial in trials:
        total += trial.user_attrs.get("worked", 0.0)
        if trial.state == TrialState.RUNNING:
            total += max(0.0, time.time() - (trial.user_attrs.get("claimed") or time.time()))
    return total


def is_spent(study: Study, config: SweepConfig) -> bool:
    """Whether no further trial of the study may begin."""
    budget = budget_of(study, config)
    trials = study.get_trials(deepcopy=False)
    tokens, hours = budget.tokens, budget.hours
    return (tokens is not None and spent_tokens(trials) >= tokens) or (
        hours is not None and spent_seconds(trials) >= 3600 * hours
    )


def has_begun(trial: FrozenTrial) -> bool:
    return "claimed" in trial.user_attrs


def not_started(study: Study, config: SweepConfig) -> int:
    """How many waiting trials the budget leaves out."""
    if not is_spent(study, config):
        return 0
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return sum(not has_begun(trial) for trial in waiting)


def is_open(study: Study, config: SweepConfig) -> bool:
    """True while a trial runs, or waits and may be taken."""
    states = (TrialState.WAITING, TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states)) > not_started(study, config)
