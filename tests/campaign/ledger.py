"""What happened inside the sweep's processes, noted outside its disk: a line an event, appended at once."""

import os
from pathlib import Path

HOME = "CAMPAIGN_HOME"  # names the campaign's own folder to the processes of the sweep


def note(event: str, path: Path) -> None:
    """Append; a line this short is written whole or not at all, whoever else writes."""
    with open(Path(os.environ[HOME]) / event, "ab", buffering=0) as file:
        file.write(f"{path.resolve()}\n".encode())
