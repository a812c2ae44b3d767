"""Many runs: spaces, workers, reports."""
