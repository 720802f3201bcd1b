"""The store: what the API confirmed, in SQLite, written so that PostgreSQL can follow."""
