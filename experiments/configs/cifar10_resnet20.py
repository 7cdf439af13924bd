"""CIFAR-10, the standard ResNet-20, 200 epochs in all: the protocol of the published figures.

    bitmixer prepare cifar10 --source cifar-10-python.tar.gz --data_dir data
    bitmixer train --config experiments/configs/cifar10_resnet20.py:float --workdir runs/r20-float
    bitmixer train --config experiments/configs/cifar10_resnet20.py --workdir runs/r20 \
        --config.init_from=runs/r20-float

This is for an accelerator. No run of it has been made yet, so no time and no accuracy are given.
"""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "cifar10"
    config.model.name = "resnet20"
    config.pad = 4
    config.flip = True
    config.stages.activations.epochs = 40.0
    config.stages.weights.epochs = 60.0
    config.stages.mixed.epochs = 100.0
    config.evaluate_every = 10.0
    config.steps_per_dispatch = 10
    if variant == "float":
        return baseline_config(config, epochs=200.0)
    return config
