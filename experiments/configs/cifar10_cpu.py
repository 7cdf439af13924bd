"""CIFAR-10 with a network sized for CPUs: 6 quantised layers, a stem of stride 2.

    bitmixer train --config experiments/configs/cifar10_cpu.py:float --workdir runs/float-s0
    bitmixer train --config experiments/configs/cifar10_cpu.py --workdir runs/tbn-s0 \\
        --config.init_from=runs/float-s0

They take 13 and 33 minutes on one CPU core. Expect 83.7% for the full-precision baseline. Then
expect 85.0 / 84.3 / 82.1% at 4 / 3 / 2 bits and 83.8% in the mean of random policies (two seeds;
experiments/README.md).
"""

from bitmixer_jax.training import baseline_config, default_config


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
        return baseline_config(config, epochs=12.0)
    return config
