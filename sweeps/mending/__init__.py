"""What kills leave in disagreement, repaired: a module for each kind of record (sweeps.reconcile)."""
