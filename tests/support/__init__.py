"""Helpers of the tests: a real server, a small client, the published clients' environments."""
