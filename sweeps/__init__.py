"""Many runs. Here are the commands and the conduct of a whole sweep; what they are made of has rooms:

planning     which trials there are to be: plans, samplers, budgets
stores       where studies live and who holds which lock; the study directory
trials       one trial: its claim, its processes, what it shares with others
mending      what kills leave in disagreement, repaired
reports      what a sweep has found: results, tables, figures, the live table
laws         laws of capacity: search, criteria, fits, their report
readiness    the checks of sweeps.preflight
"""
