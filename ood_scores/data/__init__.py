"""Image datasets: how they are named, opened, and obtained."""
