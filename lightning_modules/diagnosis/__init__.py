"""What `lightning_modules.diagnose` finds out: where a model collapses, in which heads, and why."""
