"""Parse answers: numbers and mathematics in plain text, LaTeX and Unicode.

``lexer`` splits a text into tokens, ``marks`` and ``prose`` find the answer in a reply,
``quantity`` parses a number with its unit, ``grammar`` parses mathematics, and ``algebra`` compares
parsed answers with sympy. The running time of all modules except ``algebra`` is linear in the
length of the text.
"""
