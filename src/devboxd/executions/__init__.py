"""Executions: commands in devboxes, never lost. The heart of the project."""
