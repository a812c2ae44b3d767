"""The checks of sweeps.preflight."""
