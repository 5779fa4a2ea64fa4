"""Reports on rewards: numbers, findings as sentences, and Markdown pages."""
