"""What every part that does several things at once stands on: owned tasks, threads, waits, the clock."""
