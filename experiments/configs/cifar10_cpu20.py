"""CIFAR-10 with a ResNet-20 sized for CPUs: 18 quantised layers, a stem of stride 2.

Training leaves the last tenth of the training images to the search for policies.

    bitmixer train --config experiments/configs/cifar10_cpu20.py:float --workdir runs/float20-s0
    bitmixer train --config experiments/configs/cifar10_cpu20.py --workdir runs/net20-s0 \\
        --config.init_from=runs/float20-s0
"""

from bitmixer_jax.training import baseline_config, default_config


def get_config(variant=""):
    config = default_config()
    config.dataset = "cifar10"
    config.train_split = "train[:45000]"
    config.model.name = "resnet20"
    config.model.stem_strides = 2
    config.pad = 4
    config.flip = True
    config.optimizer.weight_decay = 5e-4
    config.stages.activations.epochs = 2.0
    config.stages.weights.epochs = 4.0
    config.stages.mixed.epochs = 10.0
    config.evaluate_every = 4.0
    config.evaluate_random = 0
    if variant == "float":
        return baseline_config(config, epochs=10.0)
    return config
