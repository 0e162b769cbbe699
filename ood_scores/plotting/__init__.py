"""Figures of scores, feature norms and neural collapse."""
