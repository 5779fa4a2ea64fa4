"""An OpenAI-compatible server over the rollout engines and the rewards of the toolkit."""
