"""What to run: the config dataclasses (`schema`), their loader (`load`), and the shipped YAML files."""
