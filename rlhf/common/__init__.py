"""Small helpers that every package may use, such as those for names, imports and files."""
