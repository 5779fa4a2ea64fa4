"""Collect people's labels on a local page or in the terminal, and measure their agreement."""
