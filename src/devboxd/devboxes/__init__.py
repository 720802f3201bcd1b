"""Devboxes: what they are, which states they pass through, and who performs what the states ask for."""
