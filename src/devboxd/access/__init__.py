"""Ways into a devbox besides commands: files."""
