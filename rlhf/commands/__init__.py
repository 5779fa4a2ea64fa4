"""The class of the command table, and the commands that neither train nor run studies."""
