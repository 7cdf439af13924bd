"""Digits (8x8, bundled with scikit-learn) with a small residual network: the demo.

    bitmixer train --config experiments/configs/digits.py:float --workdir runs/digits-float
    bitmixer train --config experiments/configs/digits.py --workdir runs/digits \\
        --config.init_from=runs/digits-float

The second command takes half a minute on 2 CPU cores. Expect 97.5-99.5% at each width and in the
mean of random policies, and no random policy below 96.9% (three seeds; README).
"""

from bitmixer_jax.training import baseline_config, default_config


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
        return baseline_config(config, epochs=30.0)
    return config
