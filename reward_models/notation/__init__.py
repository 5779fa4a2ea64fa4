"""Reading answers: numbers and mathematics in plain text, LaTeX and Unicode.

``lexer`` makes tokens, ``marks`` and ``prose`` find the answer in a reply, ``quantity`` reads one
number with its unit, ``grammar`` reads mathematics, ``algebra`` (sympy) compares it. Everything
but ``algebra`` runs in time linear in the text.
"""
