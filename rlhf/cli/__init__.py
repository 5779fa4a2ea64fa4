"""The command line: the table of commands, their arguments and their help."""
