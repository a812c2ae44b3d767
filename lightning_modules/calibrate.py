"""Measure, on held-out text that no evaluation reads, what a mitigation needs to know of a checkpoint.

    python -m lightning_modules.calibrate checkpoint=PATH mitigation.name=NAME [key=value ...]

state_norm      the largest norm (or a quantile) of every head's state within the training length
token_filter    LongMamba's thresholds of dt for heads that remember, by prompt length
delta_scale     a factor of dt for every layer, by zeroth-order search of the loss beyond the training length:
                of all tokens of documents, of the answers of a task
decay_scale     a factor of A for every layer, likewise

Writes a small file next to the checkpoint (or output=FILE) with the identity of its weights. Every command
takes it as mitigation.calibration=FILE; measuring ones also take auto, which finds or makes it:

    python -m lightning_modules.calibrate checkpoint=runs/demo mitigation.name=state_norm norms.quantile=0.99
    python -m lightning_modules.evaluate checkpoint=runs/demo \\
        mitigation.name=state_norm mitigation.every=64 mitigation.calibration=auto
"""

from conf.calibrate_schema import CalibrateConfig
from conf.load import from_command_line, user_errors
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(CalibrateConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        from lightning_modules.calibration.run import calibrate  # imports torch: only for a config that holds

        calibrate(config)


if __name__ == "__main__":
    main()
