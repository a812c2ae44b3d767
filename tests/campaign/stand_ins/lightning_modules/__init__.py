"""On the path of a campaign's processes before the real package: stands in for its commands, is it otherwise."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[4] / "lightning_modules"))
