"""Activation shapers: each reshapes the features that another scorer reads."""
