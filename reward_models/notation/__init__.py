"""Parse answers: numbers and mathematics in plain text, LaTeX and Unicode.

``lexer`` produces tokens, ``marks`` and ``prose`` find the answer in a reply, ``quantity`` parses a
number with its unit, ``grammar`` parses mathematics, and ``algebra`` compares it with sympy. All of
them except ``algebra`` take time linear in the length of the text.
"""
