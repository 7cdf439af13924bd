"""Digits with the smallest network, for tests: steps take milliseconds."""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.batch_size = 64
    config.train_split = "train[:256]"
    config.test_split = "test[:100]"
    config.model.width = 4
    config.evaluate_every = 0.0
    config.evaluate_random = 2
    config.report_random = 5
    config.log_every = 2
    config.stages.activations.epochs = 0.5
    config.stages.weights.epochs = 1.5
    config.stages.mixed.epochs = 20.0
    config.stages.mixed.rho_start = 1.0
    if variant == "float":
        return baseline_config(config, epochs=2.0)
    if variant == "raises":
        raise RuntimeError("this file is broken")
    return config
