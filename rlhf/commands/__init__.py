"""The class of the command table, and the commands other than training and studies."""
