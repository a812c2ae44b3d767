"""The sampler of a trial, and what it is asked: conf's search spaces in Optuna's terms.

A power-of-two range is an integer exponent, named log2(NAME): it keeps its order and its scale.
"""

import random
import re
import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from conf.search_space import Choices, Point, Space, holds
from conf.sweep_schema import SweepConfig, mitigation_spaces, train_space
from sweeps.stores.store import stage_name

EXPONENT = re.compile(r"^log2\((.+)\)$")


def make_sampler(study: Study, config: SweepConfig, plan_key: str) -> BaseSampler:
    """A fresh sampler per trial, seeded by what the trial is rather than by who runs it: workers do not
    repeat each other, and random search is the same whatever dies."""
    seed = random.Random(repr([config.seed, stage_name(study), plan_key])).getrandbits(32)
    startup = max(4, 2 * config.workers)
    is_training = study.user_attrs["stage"] == "train"
    name = config.train.sampler if is_training else config.mitigation.sampler
    with warnings.catch_warnings():  # `group` and GPSampler are marked as experimental
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "gp":
            return GPSampler(seed=seed, n_startup_trials=startup)
        if name != "tpe":
            return RandomSampler(seed=seed)
        if is_training:
            return TPESampler(seed=seed, n_startup_trials=startup)
        # Settings of one mitigation are tuned together, those of others apart; each begins at random.
        startup *= len(config.mitigation.space)
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True)


def suggest(trial: Trial, config: SweepConfig) -> None:
    """Let the sampler set every parameter of the trial that is not set yet."""
    if "point" in trial.user_attrs:
        return
    if trial.study.user_attrs["stage"] == "train":
        _suggest_space(trial, train_space(config), {})
    else:
        spaces = mitigation_spaces(config)
        name = trial.suggest_categorical("mitigation.name", list(spaces))
        _suggest_space(trial, spaces[name], {"mitigation.name": name})


def point_of(trial: FrozenTrial | Trial) -> Point:
    """What the trial sets, by dotted name; of a trial that has not started, what is known of it."""
    return trial.user_attrs.get("point") or {**trial.user_attrs["fixed"], **from_parameters(trial.params)}


def to_parameters(point: Point, powers: list[str]) -> Point:
    """A point in Optuna's names. Two mitigations may share a setting, `every`, with other values each.

    powers: the names whose range is of powers of two, from `powers_of`.
    """
    mitigation = point.get("mitigation.name")
    parameters = {}
    for name, value in point.items():
        parameter = _parameter(name, mitigation)
        if parameter in powers:
            parameters[f"log2({parameter})"] = value.bit_length() - 1
        else:
            parameters[parameter] = value
    return parameters


def from_parameters(parameters: Point) -> Point:
    mitigation, point = parameters.get("mitigation.name"), {}
    for parameter, value in parameters.items():
        power = EXPONENT.match(parameter)
        name = power.group(1) if power else parameter
        if mitigation is not None:
            name = name.replace(f"mitigation.{mitigation}.", "mitigation.")
        point[name] = 2**value if power else value
    return point


def powers_of(config: SweepConfig, stage: str) -> list[str]:
    """Settings that are searched as exponents, as Optuna would name them otherwise."""
    spaces = {None: train_space(config)} if stage == "train" else mitigation_spaces(config)
    return [
        _parameter(name, mitigation)
        for mitigation, space in spaces.items()
        for name, part in space.items()
        if not isinstance(part, Choices) and part.power_of_two
    ]


def _parameter(name: str, mitigation: str | None) -> str:
    if mitigation is None or name == "mitigation.name":
        return name
    return name.replace("mitigation.", f"mitigation.{mitigation}.")


def _suggest_space(trial: Trial, space: Space, point: Point) -> None:
    mitigation = point.get("mitigation.name")
    for name, part in space.items():
        if not holds(part.when, point):
            continue
        parameter = _parameter(name, mitigation)
        if isinstance(part, Choices):
            point[name] = trial.suggest_categorical(parameter, part.values)
        elif part.power_of_two:
            point[name] = 2 ** trial.suggest_int(f"log2({parameter})", *part.exponents)
        elif part.integer:
            point[name] = trial.suggest_int(parameter, int(part.low), int(part.high), log=part.log)
        else:
            point[name] = trial.suggest_float(parameter, part.low, part.high, log=part.log)
