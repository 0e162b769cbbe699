"""Kinds of datasets: each module opens one kind."""
