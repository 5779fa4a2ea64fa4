"""Talk to models side by side, in the terminal and on a local page."""
