"""The tiny reward models of the tests of rewards."""

from tests.reward_models.conftest import decoder_path, encoder_path, helpers

__all__ = ["decoder_path", "encoder_path", "helpers"]
