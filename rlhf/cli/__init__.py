"""The command line: the table of commands, their arguments, help and dry runs."""
