"""Numerical building blocks that several scorers share."""
