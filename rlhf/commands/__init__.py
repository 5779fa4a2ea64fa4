"""What the commands do that neither train nor run studies, and the class of a command itself."""
