"""Which trials there are to be: plans, samplers, budgets."""
