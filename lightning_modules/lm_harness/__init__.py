"""Our models as a model of lm-evaluation-harness (`lm_eval`, an optional extra)."""
