"""The command line: the table of commands, argument parsing and help texts."""
