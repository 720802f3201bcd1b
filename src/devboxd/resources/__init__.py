"""Small resources, one file each."""
