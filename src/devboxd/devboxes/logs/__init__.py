"""The log of a devbox: what happened to it, the commands that ran there, and their output."""
