"""What a stand-in trial computes: a chaotic map, so that one step repeated, skipped or restored a bit off
shows in every digit of the result. A pure function of config and step count: replayed in microseconds."""

from conf.schema import TrainConfig

State = list[float]


def begin(config: TrainConfig) -> State:
    """The state before the first step."""
    return [
        (0.1 + 0.7 * ((config.seed * 31 + config.model.d_state * 7 + i * 13) % 97) / 97) for i in range(4)
    ]


def advance(state: State, config: TrainConfig) -> State:
    rate = 3.6 + 0.3 / (1.0 + 100.0 * config.optim.lr)
    mixed = sum(state) / len(state)
    return [rate * x * (1.0 - x) * 0.9 + 0.1 * mixed for x in state]


def loss(state: State) -> float:
    return sum(state) / len(state)


def recent_exact(state: State) -> float:
    """What evaluation measures far beyond the training length."""
    return min(1.0, max(0.0, 0.1 + 0.8 * state[0]))


def trained(config: TrainConfig) -> State:
    """The state that an undisturbed training ends in."""
    state = begin(config)
    for _ in range(config.trainer.max_steps):
        state = advance(state, config)
    return state
