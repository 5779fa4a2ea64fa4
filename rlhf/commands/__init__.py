"""The table class of commands, and the commands that neither train nor run studies."""
