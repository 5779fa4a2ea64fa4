"""Small helpers that every package may use: names, imports and files."""
