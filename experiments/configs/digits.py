"""Digits (8x8, bundled with scikit-learn) with a small residual network: the demo."""

from bitmixer_jax.training import default_config, float_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "digits"
    config.batch_size = 64
    config.model.width = 16
    config.pad = 1
    config.stages.activations.epochs = 8.0
    config.stages.weights.epochs = 15.0
    config.stages.mixed.epochs = 30.0
    config.evaluate_every = 10.0
    if variant == "float":
        return float_config(config, epochs=30.0)
    return config
