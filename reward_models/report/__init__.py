"""Reports on rewards: numbers, findings in sentences, and Markdown pages."""
