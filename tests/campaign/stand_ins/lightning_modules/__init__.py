"""On the path of a campaign's processes before the real package: stands in for its commands, else is it."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[4] / "lightning_modules"))
