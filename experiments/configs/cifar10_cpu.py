"""CIFAR-10 with a network sized for CPUs."""

from bitmixer_jax.training import default_config, float_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "cifar10"
    config.model.width = 32
    config.model.stem_strides = 2
    config.pad = 4
    config.flip = True
    config.optimizer.weight_decay = 5e-4
    config.stages.activations.epochs = 2.0
    config.stages.weights.epochs = 4.0
    config.stages.mixed.epochs = 10.0
    config.evaluate_every = 2.0
    if variant == "float":
        return float_config(config, epochs=12.0)
    return config
