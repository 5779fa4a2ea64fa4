"""The command line: the table of commands, the parser of arguments, and the help texts."""
