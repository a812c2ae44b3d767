"""Recurrent models of other families, read by diagnose and evaluate as our own are."""
