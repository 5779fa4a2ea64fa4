"""A rollout engine that samples uniformly from the vocabulary, for tests of the training loop."""

import numpy as np

from rlhf.plugins import register_engine
from rlhf.rollout.sampling.base import Completion, EngineBase, FinishReason

plugin_api = 1


@register_engine("uniform")
class UniformEngine(EngineBase):
    """Sample ``length`` tokens for each completion."""

    def __init__(self, model, config, *, length=2):
        self.vocabulary, self.length, self.requests = model.config.vocab_size, length, []

    def submit(self, requests):
        self.requests += requests

    def poll(self):
        requests, self.requests = self.requests, []
        return list(map(self.complete, requests))

    def complete(self, request):
        count = min(self.length, request.max_new_tokens)
        tokens = np.random.default_rng(request.seed).integers(self.vocabulary, size=count).tolist()
        scores = [-float(np.log(self.vocabulary))] * count
        return Completion(request, tokens, scores, FinishReason.LENGTH, self.policy_version)
