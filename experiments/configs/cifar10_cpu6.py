"""CIFAR-10 with 6 quantised layers of 16 channels: 729 policies, few enough to try them all.

Training leaves the last tenth of the training images to the search for policies.

    bitmixer train --config experiments/configs/cifar10_cpu6.py:float --workdir runs/float6-s0
    bitmixer train --config experiments/configs/cifar10_cpu6.py --workdir runs/net6-s0 \\
        --config.init_from=runs/float6-s0
"""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "cifar10"
    config.train_split = "train[:45000]"
    config.model.stem_strides = 2
    config.pad = 4
    config.flip = True
    config.stages.activations.epochs = 2.0
    config.stages.weights.epochs = 4.0
    config.stages.mixed.epochs = 10.0
    config.evaluate_every = 4.0
    config.evaluate_random = 0
    if variant == "float":
        return baseline_config(config, epochs=10.0)
    return config
