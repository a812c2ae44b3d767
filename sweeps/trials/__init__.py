"""One trial: who has it, the processes that it is, what it shares with others."""
