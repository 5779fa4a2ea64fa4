"""What commands do that neither train nor evaluate: demonstrations, splits, replies, scores."""
