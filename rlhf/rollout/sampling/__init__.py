"""Parts of the sampler: masks, states, the model's own cache, and the choice among them."""
